"""Bad input is one sentence and exit code 2, and costs nothing that is measured."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from command_lines import FAST_TTFT

LONG = "9" * 5000
"""More digits than Python reads."""


@pytest.fixture(scope="module")
def patterns_of_another_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("patterns") / "other.json"
    path.write_text(json.dumps([{"0": ["vertical_and_slash", 100, 800, 1.0]}] * 2))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("ttft", "--method", "trimix"), "--method trimix is unknown: choose from dense, tri_mix"),
        (("ttft", "--method", "[/b]"), "--method [/b] is unknown: choose from dense, tri_mix"),
        (("probe", "--task", "[vt]"), "--task [vt] is unknown"),
        (("ttft", "--layers", "[/x]"), "--layers [/x] is neither a list of layers"),
        (("ttft", "--length", "[/x]"), "'[/x]' is no number of tokens"),
        (("ttft", "--length", "32X"), "32768 or 32K"),
        *((("ttft", "--length", text), f"'{text}' is no number of tokens") for text in ("inf", "nan", "1e400", "infK")),
        (("ttft", "--seed", str(2**63), "--prompt", "random"), "--seed"),
        (("ttft", "--length", "32K"), "--length 32768 is more than the 16384 positions of tiny"),
        (("ttft", "--prompt", "poem"), "--prompt poem is unknown: choose from kv, random, niah_single_1"),
        (("ttft", "--length", "64", "--prompt", "vt"), "--length 64 is too short for --prompt vt, which needs 251"),
        (("agree", "--length", "64", "--prompt", "vt"), "--length 64 is too short for --prompt vt, which needs 251"),
        (("ttft", "--model", "no/such-folder/anywhere"), "--model no/such-folder/anywhere cannot be loaded"),
        (("ttft", "--dtype", "float8"), "float32"),
        (("ttft", "--device", "nonsense"), "--device nonsense cannot be used here"),
        (("ttft", "--device", "meta"), "--device meta has no backend of attention: choose from"),
        (("env", "--device", "mps"), "--device mps has no backend of attention: choose from"),
        (("ttft", "--repeats", "0"), "--repeats"),
        (("ttft", "--dry-run", "--json"), "--dry-run prints a table of what would be measured, and --json rows: leave one"),
        (("ttft", "--starting-layer", "9"), "--starting-layer must be between 0 and 8"),
        (("ttft", "--layers", "9"), "--layers 9: 9 is not within the layers 0 to 7 of this model"),
        (("ttft", "--layers", "9-"), "--layers 9-: 9- is not within the layers 0 to 7 of this model"),
        (("ttft", "--starting-layer", "-1"), "--starting-layer must be between 0 and 8"),
        (("ttft", "--starting-layer", LONG), "--starting-layer must be between 0 and 8"),
        (("ttft", "--starting-layer", "auto"), "--starting-layer auto is not the number of a layer: --layers takes"),
        (("ttft", "--layers", "2,9"), "--layers 2,9: 9 is not within the layers 0 to 7 of this model"),
        (
            ("ttft", "--layers", "deep"),
            "--layers deep is neither a list of layers, such as 16- or 5,7,10-15, nor auto nor a file",
        ),
        (("ttft", "--layers", "none.csv"), "none.csv cannot be read"),
        (("ttft", "--layers", LONG), "999 is not within the layers 0 to 7 of this model"),
        (("ttft", f"--layers=-{LONG}"), "999 is neither a list of layers"),
        (("ttft", "--layers", "0-99999999999"), "0-99999999999 is not within the layers 0 to 7 of this model"),
        (("ttft", "--layers", f"0-{LONG}"), "999 is not within the layers 0 to 7 of this model"),
        (("ttft", "--layers", f"random:{LONG}"), "999 of 8 layers: ask for fewer"),
        (("ttft", "--layers", f"random:4:{LONG}"), "may name a seed of at most 18 digits: random:4 or random:4:7"),
        (("ttft", "--layers", "random:1e9"), "--layers random:1e9 must say how many layers"),
        (("ttft", "--length", LONG), "is no number of tokens"),
        (("ttft", "--length", "1e15"), "'1e15' is more tokens than any prompt has"),
        (
            ("ttft", "--n-local", "99999999999999999999"),
            "--n-local is more tokens than any prompt has: give 2147483647",
        ),
        (("ttft", "--method", LONG), "999 is unknown: choose from dense"),
        (("ttft", "--method", f"flexprefill:min_budget={LONG}"), "min_budget must be a whole number, not '999"),
        (("ttft", "--method", "flexprefill:min_budget=99999999999"), "min_budget is more tokens than any prompt has"),
        (("ttft", "--method", f"flexprefill:gamma={LONG}"), "gamma must be above 0 and at most 1, not inf"),
        (("ttft", "--layers", "auto"), "--layers auto finds no probe of tiny under results: run tmbench probe --model tiny"),
        (
            ("ttft", "--layers", "2,3", "--starting-layer", "4"),
            "--starting-layer 4 and --layers 2,3 both say where triangle attention is: give one of them",
        ),
        (("ttft", "--layers", "2,3", "--layers", "4-"), "--layers is given 2 times: give it once"),
        (("agree", "--starting-layer", "2", "--starting-layer", "4"), "--starting-layer is given 2 times: give it once"),
        (
            ("sweep", "--device", "cpu", "--offline", "--layers", "2,3", "--starting-layer", "4"),
            "--starting-layer 4 and --layers 2,3 both say where triangle attention is: give one of them",
        ),
        (("ttft", "--method", "dense", "--layers", "2,3"), "--layers changes none of dense: leave it out"),
        (("ttft", "--method", "dense", "--starting-layer", "2"), "--starting-layer changes none of dense: leave it out"),
        (("ruler", "--layers", "auto", "--offline"), "--layers auto finds no probe of tiny"),
        (("probe", "--task", "niah"), "--task niah is unknown: choose from kv, random, niah_single_1"),
        (("probe", "--length", "600"), "--length 600 leaves no pair between the first 8 keys, the window of 512"),
        (("probe", "--length", "670"), "--length 670 leaves no pair between the first 8 keys, the window of 512"),
        (("probe", "--length", "32K"), "--length 32768 is more than the 16384 positions of tiny"),
        (("probe", "--accuracy-budget", "2"), "--accuracy-budget is a share, from 0 to 1, not 2"),
        (("probe", "--accuracy-budget", "0.1", "--time-budget", "0.5"), "exclude each other: give one of them"),
        (("probe", "--time-budget", "0.1"), "--time-budget 0.1 is less than the 0.29"),
        (("probe", "--method", "dense"), "--method needs --loss"),
        (("probe", "--layers", "4"), "--layers needs --loss"),
        (("probe", "--loss", "--plot", "a.png"), "--plot has no meaning with --loss: leave it out"),
        (("probe", "--loss", "--rule", "depth"), "--rule has no meaning with --loss: leave it out"),
        (("probe", "--plot", "a.xyz"), "--plot a.xyz must be the name of a PNG file: let it end in .png"),
        (("patterns", "show", "none.json", "--plot", "a.xyz"), "--plot a.xyz must be the name of a PNG file"),
        (("probe", "--dtype", "float16", "--device", "cpu"), "--dtype float16 cannot hold gradients as small as these"),
        (("probe", "--model", "llama-3.1-8b"), "is a preset, a config without weights: add --weights random"),
        (("ruler", "--plan", "--json"), "--plan or --dry-run prints a table of what would be measured, and --json rows"),
        (("ruler", "--shard", "3"), "--shard 3 is no part of a run: give for instance 3/16, from 1/16 to 16/16"),
        (("agree", "--shard", "17/16"), "--shard 17/16 is no part of a run: give for instance 3/16"),
        (("probe", "--shard", "0/4"), "--shard 0/4 is no part of a run"),
        (("sweep", "--shard", "a/b"), "--shard a/b is no part of a run"),
        (("ruler", "--shard", "1/2", "--overwrite"), "--overwrite does not go with --shard"),
        (("probe", "--shard", "1/2", "--plot", "a.png"), "--plot needs the samples of all shards, and this is one of them"),
        (("merge", "none", "nowhere"), "none is no folder: give those that runs with --shard were given as --output-dir"),
        (("merge", "."), "there are no shards in .: give the folders that runs with --shard"),
        (("ttft", "--n-local", "-1"), "--n-local must be 0 or more, not -1"),
        (("ttft", "--method", "dense", "--n-local", "4"), "--n-local changes none of dense: leave it out"),
        (("ttft", "--patterns", "none.json"), "--patterns: "),
        (
            ("ttft", "--method", "flexprefill:gamma=95"),
            "--method flexprefill:gamma=95: gamma must be above 0 and at most 1, not 95",
        ),
        (("ruler", "--method", "xattention:stride=12"), "--method xattention:stride=12: stride must divide 128"),
        (
            ("ttft", "--method", "flashprefill:gamma=0.9"),
            "flashprefill has no parameter 'gamma': it has alpha",
        ),
        (
            ("ttft", "--method", "dense", "--method", "tri_mix_oracle_blocks:p=0.9"),
            "--method tri_mix_oracle_blocks is not timed, as it computes dense attention to choose its keys: leave it out",
        ),
        (("sweep", "--method", "tri_mix_oracle_blocks", "--n-local", "64"), "--method tri_mix_oracle_blocks is not timed"),
        (
            ("ruler", "--method", "oracle_blocks:like=flashprefill:alpha=3"),
            "like: flashprefill's alpha must be between 0 and 1, not 3",
        ),
        (
            ("ttft", "--method", "dense", "--method", "dense:dense_backend=torch", "--dense-backend", "sdpa"),
            "--method dense is given with several backends",
        ),
        (
            ("ttft", "--method", "xattention:stride=8", "--n-local", "4"),
            "--n-local changes none of xattention: leave it out",
        ),
        (
            ("ttft", "--dense-backend", "fa5"),
            "--dense-backend fa5 is unknown: choose from flash-attn-4, flash-attn-3, cudnn",
        ),
        (("ttft", "--device", "cpu", "--dense-backend", "cudnn"), "cudnn runs on cuda, not on cpu: as things are, tiny at"),
        (("ttft", "--method", "streaming", "--dense-backend", "sdpa"), "--dense-backend changes none of streaming"),
        (("ruler", "--device", "cpu", "--offline", "--dense-backend", "cudnn"), "--dense-backend cudnn runs on cuda"),
        (("ruler", "--task", "niah"), "--task niah is unknown: choose from niah_single_1"),
        (("ruler", "--task", "cwe", "--length", "300", "--offline"), "--length 300 is too short for cwe"),
        (("ruler", "--length", "131072"), "--length 131072 is more than the 16384 positions of tiny"),
        (("ruler", "--data", "none"), "--data needs --length"),
        (("ruler", "--data", "none", "--length", "2K", "--task", "vt"), "--data: The data folder none holds no"),
        *(
            (("ruler", "--data", "none", "--length", "2K", *option), f"{option[0]} does not go with --data")
            for option in (
                ("--wording", "reference"),
                ("--data-dir", "d"),
                ("--offline",),
                ("--apply-chat-template",),
                ("--seed", "7"),
                ("--samples-as", "reference"),
            )
        ),
        (
            ("ruler", "--task", "vt", "--length", "512", "--offline", "--samples-as", "reference"),
            "--samples-as reference: Task vt finds no sample that fits 512 tokens, drawn as the reference draws it",
        ),
        (
            (
                "ruler-data",
                "--output",
                "d",
                "--task",
                "vt",
                "--length",
                "1K",
                "--samples-as",
                "reference",
                "--seed",
                "4294967296",
            ),
            "--samples-as reference: The seed 4294967296 is too large for the reference's draws: take one up to 4294967295",
        ),
        (
            ("sweep", "--task", "qa_1", "--length", "2K", "--offline", "--samples-as", "reference", "--samples", "99999"),
            "--samples 99999 is more than the",
        ),
        (("ruler", "--samples-as", "nvidia"), "is not one of 'tmbench', 'reference'"),
        (("ruler", "--data-dir", "none"), "--data-dir: The data folder none does not exist"),
        (("ruler", "--wording", "none.toml"), "--wording: The wording 'none.toml' cannot be read"),
        (("sweep", "--wording", "none.toml"), "--wording: The wording 'none.toml' cannot be read"),
        (
            ("ruler-data", "--output", "/dev/null/d", "--task", "vt", "--length", "1K", "--samples", "1"),
            "--output: The data set /dev/null/d/1024/data/vt/validation.jsonl cannot be written",
        ),
        (("ruler", "--apply-chat-template", "--offline"), "no chat template"),
        (("patterns", "search"), "--output"),
        (("patterns", "search", "--output", "a.json", "--length", "2K"), "--length 2048 leaves nothing to search"),
        (("patterns", "search", "--output", "a.json", "--length", "32K"), "--length 32768 is more than the 16384 positions"),
        (("patterns", "search", "--output", "a.json", "--prompt", "poem"), "--prompt poem is unknown: choose from kv"),
        (("patterns", "search", "--output", "/dev/null/a.json", "--length", "2600", "--device", "cpu"), "--output: "),
        (("patterns", "search", "--output", "x" * 300), "cannot be written (File name too long)"),
        (("patterns", "show", "none.json"), "FILE: none.json cannot be read: No such file or directory; give one that"),
        (("patterns", "show"), "FILE"),
        (("agree", "--method", "dense"), "--method dense alone has nothing to agree with: add another --method"),
        (("agree", "--prompt", "poem"), "--prompt poem is unknown: choose from kv, random, niah_single_1"),
        (("agree", "--length", "16K", "--device", "cpu"), "give a length of 16128 or less, or fewer new tokens"),
        (("agree", "--new-tokens", "0"), "--new-tokens"),
        (
            ("sweep", "--method", "dense"),
            "--method dense has no triangle whose parameters could be swept: choose from tri_mix",
        ),
        (("sweep", "--device", "cpu", "--offline", "--last-n", "0"), "a sweep needs at least two variants: give --layers"),
        (("sweep", "--last-n", "0", "--last-n", "-1"), "--last-n must be 0 or more, not -1"),
        (("sweep", "--device", "cpu", "--offline", "--starting-layer", "9"), "--starting-layer must be between 0 and 8"),
        (("sweep", "--task", "niah"), "--task niah is unknown: choose from niah_single_1"),
        (("report",), "tmbench ttft"),
        (("report", "--margin", "0"), "--margin must be above 0 and at most 100 points, not 0: 1 is usual"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmbench, arguments, words):
    code, _, err = tmbench(*arguments)
    assert code == 2
    assert words in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    assert len(err) < 2000
    assert not list(Path().glob("results/*/*/*.csv"))


def test_budgets_for_another_model(tmbench, patterns_of_another_model):
    code, _, err = tmbench("ttft", "--method", "minference", "--patterns", patterns_of_another_model)
    assert code == 2
    assert "2 layers" in err


@pytest.mark.slow
def test_a_corrupt_csv_is_named_and_kept(tmbench):
    assert tmbench(*FAST_TTFT, "--method", "dense")[0] == 0
    path = next(Path("results").glob("*/ttft/dense.csv"))
    path.write_text("something,else\n1,2\n")
    for command in (FAST_TTFT, ("report",)):
        code, _, err = tmbench(*command)
        assert code == 2
        assert "dense.csv is not a results file of this version" in " ".join(err.split())
    assert path.read_text() == "something,else\n1,2\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmbench):
    Path("results").mkdir(mode=0o500)
    code, _, err = tmbench(*FAST_TTFT)
    assert code == 2
    assert "--output-dir: " in err


def test_a_folder_that_is_a_file(tmbench):
    Path("results").write_text("")
    code, _, err = tmbench(*FAST_TTFT, "--method", "dense")
    assert code == 2
    assert "--output-dir: " in err


@pytest.mark.slow
def test_a_failure_in_part_is_exit_code_1(tmbench, monkeypatch):
    from tmbench.measure import ttft

    def fail(prefill, ids):
        raise RuntimeError("a kernel broke")

    monkeypatch.setattr(ttft, "first_token", fail)
    code, out, _ = tmbench(*FAST_TTFT, "--method", "dense")
    assert code == 1
    assert "failed" in out


ENDLESS = ("pipe", "/dev/zero")


@pytest.fixture(params=ENDLESS)
def endless(request, tmp_path):
    """A file that a reader would never come to the end of."""
    path = tmp_path / f"endless-{Path(request.param).name}"
    if request.param == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(request.param)
    return path


def refused(outcome):
    """What was said, of a run that was refused in one sentence."""
    code, _, err = outcome
    assert code == 2
    assert "Traceback" not in err
    return " ".join(err.split())


@pytest.mark.slow
def test_inputs_without_an_end(tmbench, endless):
    tiny = ("--device", "cpu")
    assert "is a pipe or a device: give a file" in refused(tmbench("patterns", "show", str(endless)))
    arguments = ("ttft", "--method", "minference", "--patterns", str(endless), *tiny)
    assert f"--patterns: {endless} is a pipe or a device" in refused(tmbench(*arguments))
    assert "cannot be read: Not a regular file" in refused(tmbench("ruler", "--wording", str(endless), *tiny))
    Path("data").mkdir()
    endless.rename("data/squad.json")
    said = refused(tmbench("ruler", "--data-dir", "data", "--task", "qa_1", *tiny))
    assert "--data-dir: The file data/squad.json cannot be read: Not a regular file" in said
    Path("data/1024/data/vt").mkdir(parents=True)
    Path("data/squad.json").rename("data/1024/data/vt/validation.jsonl")
    said = refused(tmbench("ruler", "--data", "data", "--length", "1K", "--task", "vt", *tiny))
    assert "--data: The data folder data holds no validation.jsonl" in said


def test_results_without_an_end(tmbench, endless):
    folder = Path("results/some-gpu/ttft")
    folder.mkdir(parents=True)
    endless.rename(folder / "dense.csv")
    assert "ttft/dense.csv cannot be read: Not a regular file" in refused(tmbench("report"))
    (folder / "dense.csv").rename("probe.csv")
    assert "probe.csv cannot be read: Not a regular file" in refused(tmbench("ttft", "--layers", "probe.csv"))


@pytest.mark.slow
def test_a_results_folder_that_leads_into_itself(tmbench):
    assert tmbench(*FAST_TTFT, "--method", "dense")[0] == 0
    Path("results/again").symlink_to("../results")
    device = next(path for path in Path("results").iterdir() if path.name != "again")
    (device / "ttft" / "again").symlink_to("..")
    whole = tmbench("report")
    assert whole[0] == 0
    Path("results/round").symlink_to("round")
    assert "results/round/ttft cannot be read: Too many levels of symbolic links" in refused(tmbench("report"))


DEEP = "[" * 100_000 + "]" * 100_000


def test_inputs_that_are_nested_too_deeply(tmbench):
    for name in ("deep.json", "squad.json"):
        Path(name).write_text(DEEP)
    Path("deep.toml").write_text(f"a={DEEP}")
    assert "but is nested too deeply" in refused(tmbench("patterns", "show", "deep.json"))
    assert "deep.toml is nested too deeply" in refused(tmbench("ruler", "--wording", "deep.toml"))
    assert "--data-dir: The file squad.json is not in the" in refused(tmbench("ruler", "--data-dir", ".", "--task", "qa_1"))
    Path("vt").mkdir()
    Path("vt/validation.jsonl").write_text(DEEP)
    said = refused(tmbench("ruler", "--data", ".", "--length", "1K", "--task", "vt", "--device", "cpu"))
    assert "Line 1 of vt/validation.jsonl is no sample: it is nested too deeply" in said


def test_a_file_of_patterns_that_is_far_too_large(tmbench):
    with Path("huge.json").open("wb") as file:
        file.truncate(2**36)
    assert "huge.json has more than 64 MiB" in refused(tmbench("patterns", "show", "huge.json"))
