// What the kernels for Hopper share: PTX by name, the pipeline, and one consumer warpgroup's online softmax.
//
// The including file defines DIM and V_DIM, head sizes rounded up to 64; HALF, 1 for fp16 and 0 for bf16; WARPGROUP_ROWS, the
// 64 query rows of a consumer warpgroup; KEYS, the 64 or 128 keys of a tile; STAGES, the depth of the pipeline; LSE, 1 where the
// log-sum-exp is written as well; CONSUMERS, the consumer warpgroups of a program.

#pragma once

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr float RESCALE_THRESHOLD = 8.0f;     // powers of two that a logit may rise above row_max before the output is rescaled
constexpr u32 Q_HALF = WARPGROUP_ROWS * 128;
constexpr u32 K_HALF = KEYS * 128;
constexpr u32 Q_BYTES = Q_HALF * (DIM / 64);  // of one warpgroup
constexpr u32 STAGE_BYTES = K_HALF * ((DIM > V_DIM ? DIM : V_DIM) / 64);
// A multiprocessor has 65536 registers, of which each thread starts with as many. Warpgroups can only take what others have
// given up: one that asks for more than the program started with waits for ever.
constexpr u32 LAUNCH_REGISTERS = 65536 / (128 * (1 + CONSUMERS)) / 8 * 8;
constexpr u32 CONSUMER_REGISTERS = (LAUNCH_REGISTERS * (1 + CONSUMERS) - 32) / CONSUMERS / 8 * 8;
constexpr u32 PRODUCER_REGISTERS = LAUNCH_REGISTERS * (1 + CONSUMERS) - CONSUMER_REGISTERS * CONSUMERS;
static_assert(PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS <= LAUNCH_REGISTERS * (1 + CONSUMERS), "registers");
constexpr u32 SLOT_BYTES = Q_HALF * ((DIM > V_DIM ? DIM : V_DIM) / 64);  // a warpgroup's queries, and later its output

struct alignas(64) TensorMap { u64 words[16]; };

// PTX, by the names of the instructions (PTX ISA 8.0, sections in brackets):
//   mbarrier_init, _expect, _arrive, _wait   barriers in shared memory that count arrivals and bytes (9.7.13.15)
//   load_4d, load_5d, store_4d, store_5d     tensor memory accelerator: a box of a tensor to or from shared memory (9.7.9.27)
//   exp2_fast                                2^x, approximate, subnormals flushed (9.7.3.19)
//   pack                                     two floats to two 16-bit numbers, rounded to nearest (9.7.9.22)
//   wgmma_fence, _commit, _wait, _ss, _rs    a warpgroup's matrix product, asynchronous: A and B from shared memory (ss), or A
//                                            from registers (rs); the result in registers, float32 (9.7.15)
//   fence_operand                            keeps the compiler from moving registers of a product across its wait
//   matrix_descriptor                        where a product finds an operand in shared memory, swizzled by 128 bytes (9.7.15.5)

__device__ __forceinline__ void mbarrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ __forceinline__ void mbarrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(u32 barrier, u32 phase) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra WAIT;\n"
      "DONE:\n}" ::"r"(barrier), "r"(phase) : "memory");
}
__device__ __forceinline__ void load_4d(u32 to, const TensorMap* map, u32 barrier, int a, int b, int c, int d) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(to), "l"(map), "r"(barrier), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void load_5d(u32 to, const TensorMap* map, u32 barrier, int a, int b, int c, int d, int e) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
      ::"r"(to), "l"(map), "r"(barrier), "r"(a), "r"(b), "r"(c), "r"(d), "r"(e) : "memory");
}
__device__ __forceinline__ void store_5d(const TensorMap* map, u32 from, int a, int b, int c, int d, int e) {
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
               ::"l"(map), "r"(from), "r"(a), "r"(b), "r"(c), "r"(d), "r"(e) : "memory");
}
__device__ __forceinline__ void store_4d(const TensorMap* map, u32 from, int a, int b, int c, int d) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
               ::"l"(map), "r"(from), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 y;
#if HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#endif
  return y;
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
template <int N> __device__ __forceinline__ void fence_operand(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

#if HALF
#define TYPES "f32.f16.f16"
#else
#define TYPES "f32.bf16.bf16"
#endif
#define R8(a, i) "+f"(a[i]), "+f"(a[i + 1]), "+f"(a[i + 2]), "+f"(a[i + 3]), "+f"(a[i + 4]), "+f"(a[i + 5]), "+f"(a[i + 6]), "+f"(a[i + 7])
#define R32(a) R8(a, 0), R8(a, 8), R8(a, 16), R8(a, 24)
#define R64(a) R32(a), R8(a, 32), R8(a, 40), R8(a, 48), R8(a, 56)
#define D32 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define D64 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

// d (+)= A B^T: both operands in shared memory, rows of A and B contiguous.
__device__ __forceinline__ void wgmma_ss(float (&d)[32], u64 a, u64 b, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16." TYPES " " D32 ", %32, %33, p, 1, 1, 0, 0;\n}"
               : R32(d) : "l"(a), "l"(b), "r"(add));
}
__device__ __forceinline__ void wgmma_ss(float (&d)[64], u64 a, u64 b, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16." TYPES " " D64 ", %64, %65, p, 1, 1, 0, 0;\n}"
               : R64(d) : "l"(a), "l"(b), "r"(add));
}
// d (+)= A B: A in registers, B in shared memory with its rows contiguous.
__device__ __forceinline__ void wgmma_rs(float (&d)[64], const u32* a, u64 b, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16." TYPES " " D64 ", {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
               : R64(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
__device__ __forceinline__ void wgmma_rs(float (&d)[32], const u32* a, u64 b, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16." TYPES " " D32 ", {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
               : R32(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
// Tiles of 64 x 16 bit columns, 128 bytes a row, swizzled: 8 rows are 1024 bytes. ``ahead``: from one 64 columns to the next.
__device__ __forceinline__ u64 matrix_descriptor(u32 at, u32 ahead) {
  u64 y;
  asm("mov.b64 %0, {%1, %2};" : "=l"(y) : "r"((at >> 4) + ((ahead >> 4) << 16)), "n"((1024 >> 4) | 1 << 30));
  return y;
}

// Keys and values alternate in one pipeline, in the order of their use: a tile's keys before the values of the tile before it.
// The registers of the warpgroup are then those of its role.
__device__ __forceinline__ void take_producer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
}
__device__ __forceinline__ void take_consumer_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
}

struct PipelineState {
  u32 count;
  __device__ __forceinline__ u32 index() const { return count % STAGES; }
  __device__ __forceinline__ u32 phase() const { return count / STAGES & 1; }
};


#define NEG_INFINITY __int_as_float(0xff800000)

struct SoftmaxState {
  int position[2];  // of the thread's two rows
  float row_max[2], shift[2], row_sum[2][2];
};

// Logits become -inf where a row does not see the key: of the keys from..to-1 it sees those up to its own position that lie
// less than ``reach`` before it or among the first ``n_init``. Keys of all_from..all_to are seen by all rows.
__device__ __forceinline__ void mask_tile(float (&s)[KEYS / 2], const SoftmaxState& r, int first, int from, int to, int reach, int n_init,
                                          int all_from, int all_to) {
  const int base = first + 2 * (threadIdx.x & 3);
  const u32 sinks = from > 0 ? 0 : n_init;
  int low[2], high[2];
#pragma unroll
  for (int row = 0; row < 2; row++) {
    high[row] = min(r.position[row], to - 1) - base;
    low[row] = max(r.position[row] - reach + 1, from) - base;
  }
#pragma unroll
  for (int g = 0; g < KEYS; g += 16) {
    if (first + g < all_from || first + g + 15 > all_to) {
#pragma unroll
      for (int e = g / 2; e < g / 2 + 8; e++) {
        const int c = 8 * (e >> 2) + (e & 1), row = (e >> 1) & 1;
        const bool seen = (c <= high[row]) & ((c >= low[row]) | (u32(base + c) < sinks));
        s[e] = seen ? s[e] : NEG_INFINITY;
      }
    }
  }
}

// The largest of the logits that a thread has of each of its two rows.
__device__ __forceinline__ void thread_maxima(const float (&s)[KEYS / 2], float (&row_max)[2]) {
#pragma unroll
  for (int row = 0; row < 2; row++) {
    float top[4];
#pragma unroll
    for (int e = 0; e < 4; e++) top[e] = s[2 * row + (e & 1) + 4 * (e >> 1)];
#pragma unroll
    for (int g = 2; g < KEYS / 8; g += 2)
#pragma unroll
      for (int e = 0; e < 4; e++) top[e] = fmaxf(top[e], s[4 * g + 2 * row + (e & 1) + 4 * (e >> 1)]);
    row_max[row] = fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3]));
  }
}

// One step of the online softmax: logits become probabilities. Returns whether a row_max grew; the output must then be
// multiplied by acc_scale. A row_max that grows by less than RESCALE_THRESHOLD stays: few steps then rescale the output.
__device__ __forceinline__ bool softmax(float (&s)[KEYS / 2], SoftmaxState& r, float scale_log2, float (&acc_scale)[2], float (&row_max)[2]) {
  // Each of a row's four threads compares its own keys; they exchange maxima only where one grew.
  const bool grows = __any_sync(~0u, (row_max[0] * scale_log2 > r.row_max[0] + RESCALE_THRESHOLD) | (row_max[1] * scale_log2 > r.row_max[1] + RESCALE_THRESHOLD));
  if (grows) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
#pragma unroll
      for (int x = 1; x <= 2; x++) row_max[row] = fmaxf(row_max[row], __shfl_xor_sync(~0u, row_max[row], x));
      const float top = fmaxf(row_max[row] * scale_log2, r.row_max[row]);
      // A row that has seen no key yet has a row_max of -inf, and -inf - -inf is not a number.
      r.shift[row] = top == NEG_INFINITY ? 0.0f : top;
      acc_scale[row] = exp2_fast(r.row_max[row] - r.shift[row]);
      r.row_max[row] = top;
      r.row_sum[row][0] *= acc_scale[row];
      r.row_sum[row][1] *= acc_scale[row];
    }
  }
#pragma unroll
  for (int e = 0; e < KEYS / 2; e++) {
    const int row = (e >> 1) & 1;
    s[e] = exp2_fast(__fmaf_rn(s[e], scale_log2, -r.shift[row]));
    r.row_sum[row][e & 1] += s[e];
  }
  return grows;
}
__device__ __forceinline__ bool softmax(float (&s)[KEYS / 2], SoftmaxState& r, float scale_log2, float (&acc_scale)[2]) {
  float row_max[2];
  thread_maxima(s, row_max);
  return softmax(s, r, scale_log2, acc_scale, row_max);
}

__device__ __forceinline__ void to_operand(const float (&s)[KEYS / 2], u32 (&probabilities)[KEYS / 4]) {
#pragma unroll
  for (int g = 0; g < KEYS / 4; g++) probabilities[g] = pack(s[2 * g], s[2 * g + 1]);
}

__device__ __forceinline__ void gemm_qk(float (&s)[KEYS / 2], u32 q, u32 k) {
#pragma unroll
  for (int h = 0; h < DIM / 64; h++)
#pragma unroll
    for (int x = 0; x < 4; x++)
      wgmma_ss(s, matrix_descriptor(q + h * Q_HALF + 32 * x, 16), matrix_descriptor(k + h * K_HALF + 32 * x, 16), h + x);
}
// Output columns in pieces of 128, and of 64 where these are left.
__device__ __forceinline__ void gemm_pv(float (&o)[V_DIM / 2], const u32 (&probabilities)[KEYS / 4], u32 v, int add) {
#pragma unroll
  for (int x = 0; x < KEYS / 16; x++) {
    const u32 at = v + 2048 * x;
#pragma unroll
    for (int h = 0; h < V_DIM / 128; h++)
      wgmma_rs(reinterpret_cast<float(&)[64]>(o[64 * h]), probabilities + 4 * x, matrix_descriptor(at + 2 * h * K_HALF, K_HALF), x ? 1 : add);
    if constexpr (V_DIM % 128 == 64)
      wgmma_rs(reinterpret_cast<float(&)[32]>(o[V_DIM / 2 - 32]), probabilities + 4 * x, matrix_descriptor(at + (V_DIM / 64 - 1) * K_HALF, K_HALF), x ? 1 : add);
  }
}

// The log-sum-exp of a row, to base e, from its maximum, to base 2, and its sum; -inf for a row that sees no key.
__device__ __forceinline__ float log_sum_exp(float row_max, float row_sum) {
  return row_sum == 0.0f ? NEG_INFINITY : (row_max + __log2f(row_sum)) * 0.6931471805599453f;
}

// The factors 1 / row_sum of a thread's two rows; ``row_sum`` becomes that of the whole row.
__device__ __forceinline__ void output_scale(float (&row_sum)[2], float (&factor)[2]) {
#pragma unroll
  for (int row = 0; row < 2; row++) {
    row_sum[row] += __shfl_xor_sync(~0u, row_sum[row], 1);
    row_sum[row] += __shfl_xor_sync(~0u, row_sum[row], 2);
    // A row that sees no key gets zeros.
    factor[row] = row_sum[row] == 0.0f ? 0.0f : __fdividef(1.0f, row_sum[row]);
  }
}

// Write the output to the slot that held the warpgroup's queries, laid out for the tensor memory accelerator.
__device__ __forceinline__ void stage_output(const float (&o)[V_DIM / 2], const float (&factor)[2], int warpgroup, int warp, u32 slot_at) {
  const int lane = threadIdx.x & 31;
  const u32 to = slot_at + warp * 2048;
  // All warps of the warpgroup must be done with the queries.
  asm volatile("bar.sync %0, 128;" ::"r"(1 + warpgroup) : "memory");
  const u32 swizzled = to + (lane & 15) * 128 + (((lane >> 4) ^ (lane & 7)) << 4);
#pragma unroll
  for (int x = 0; x < V_DIM / 16; x++) {
    const u32 at = (swizzled ^ ((2 * x & 7) << 4)) + (x >> 2) * Q_HALF;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                 "r"(pack(o[8 * x] * factor[0], o[8 * x + 1] * factor[0])),
                 "r"(pack(o[8 * x + 2] * factor[1], o[8 * x + 3] * factor[1])),
                 "r"(pack(o[8 * x + 4] * factor[0], o[8 * x + 5] * factor[0])),
                 "r"(pack(o[8 * x + 6] * factor[1], o[8 * x + 7] * factor[1]))
                 : "memory");
  }
}
