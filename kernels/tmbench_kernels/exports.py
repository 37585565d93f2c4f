"""All that this package offers to others, imported eagerly: ``tmbench_kernels`` has it on first use."""

from tmbench_kernels.block_sparse import BlockSparse
from tmbench_kernels.block_sparse.lists import BlockLists
from tmbench_kernels.block_topk import BlockTopK
from tmbench_kernels.dense import Dense
from tmbench_kernels.flash_prefill import FlashPrefill
from tmbench_kernels.flex_prefill import FlexPrefill
from tmbench_kernels.minference import MInference, MInferenceHeads, load_patterns
from tmbench_kernels.minference.head_patterns import HeadPattern, head_patterns_json, load_head_patterns, read_head_patterns
from tmbench_kernels.oracle_blocks import OracleBlocks
from tmbench_kernels.parameters import Declared, Parameter, ParameterError, parameter
from tmbench_kernels.pattern import Backend, Pattern
from tmbench_kernels.pbs import PBS
from tmbench_kernels.section_gradients import MEASURES, SECTIONS, DenseProbe, Sections
from tmbench_kernels.skip_softmax import SkipSoftmax
from tmbench_kernels.triangle import Triangle
from tmbench_kernels.vertical_slash import VerticalSlash
from tmbench_kernels.xattention import XAttention

__all__ = [
    "MEASURES",
    "PBS",
    "SECTIONS",
    "Backend",
    "BlockLists",
    "BlockSparse",
    "BlockTopK",
    "Declared",
    "Dense",
    "DenseProbe",
    "FlashPrefill",
    "FlexPrefill",
    "HeadPattern",
    "MInference",
    "MInferenceHeads",
    "OracleBlocks",
    "Parameter",
    "ParameterError",
    "Pattern",
    "Sections",
    "SkipSoftmax",
    "Triangle",
    "VerticalSlash",
    "XAttention",
    "head_patterns_json",
    "load_head_patterns",
    "load_patterns",
    "parameter",
    "read_head_patterns",
]
