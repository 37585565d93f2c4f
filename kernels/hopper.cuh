// What the kernels for Hopper share: the instructions, by names of their own, and one team's part of attention.
//
// A team is four warps and owns TEAM_ROWS = 64 rows of queries. The including file's macros are DIM and V_DIM, head sizes as
// multiples of 64; HALF, 1 for fp16 and 0 for bf16; TEAM_ROWS; KEYS, the keys of a tile, 64; UNITS, tiles of keys or values in
// flight in one ring.

#pragma once

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr float SLACK = 8.0f;     // how far, in powers of two, a logit may rise above the peak that is subtracted
constexpr u32 Q_HALF = TEAM_ROWS * 128;
constexpr u32 K_HALF = KEYS * 128;
constexpr u32 Q_BYTES = Q_HALF * (DIM / 64);  // of one team
constexpr u32 UNIT_BYTES = K_HALF * ((DIM > V_DIM ? DIM : V_DIM) / 64);
constexpr u32 SLOT_BYTES = Q_HALF * ((DIM > V_DIM ? DIM : V_DIM) / 64);  // a team's queries, and later its output

struct alignas(64) TensorMap { u64 words[16]; };
// ---------------------------------------------------------------------------------------------------------------- PTX

__device__ __forceinline__ void bar_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
__device__ __forceinline__ void bar_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bar_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void bar_wait(u32 bar, u32 phase) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra WAIT;\n"
      "DONE:\n}" ::"r"(bar), "r"(phase) : "memory");
}
__device__ __forceinline__ void load_4d(u32 to, const TensorMap* map, u32 bar, int a, int b, int c, int d) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(to), "l"(map), "r"(bar), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void load_5d(u32 to, const TensorMap* map, u32 bar, int a, int b, int c, int d, int e) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
      ::"r"(to), "l"(map), "r"(bar), "r"(a), "r"(b), "r"(c), "r"(d), "r"(e) : "memory");
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
__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void mma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
template <int N> __device__ __forceinline__ void pin(float (&x)[N]) {
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
__device__ __forceinline__ void mma_ss(float (&d)[32], u64 a, u64 b, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16." TYPES " " D32 ", %32, %33, p, 1, 1, 0, 0;\n}"
               : R32(d) : "l"(a), "l"(b), "r"(add));
}
// d (+)= A B: A in registers, B in shared memory with its rows contiguous.
__device__ __forceinline__ void mma_rs(float (&d)[64], const u32* a, u64 b, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16." TYPES " " D64 ", {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
               : R64(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
__device__ __forceinline__ void mma_rs(float (&d)[32], const u32* a, u64 b, int add) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16." TYPES " " D32 ", {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
               : R32(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
// Tiles of 64 x 16 bit columns, 128 bytes a row, swizzled: 8 rows are 1024 bytes. ``ahead``: from one 64 columns to the next.
__device__ __forceinline__ u64 describe(u32 at, u32 ahead) {
  u64 y;
  asm("mov.b64 %0, {%1, %2};" : "=l"(y) : "r"((at >> 4) + ((ahead >> 4) << 16)), "n"((1024 >> 4) | 1 << 30));
  return y;
}

// Keys and values take turns in one ring, in the order in which they are used: the keys of a tile come before the values of
// the tile before it.
struct Ring {
  u32 count;
  __device__ __forceinline__ u32 at() const { return count % UNITS; }
  __device__ __forceinline__ u32 phase() const { return count / UNITS & 1; }
};

// ------------------------------------------------------------------------------------------------------------- a softmax

#define NONE __int_as_float(0xff800000)

struct Rows {
  int position[2];  // of the thread's two rows
  float peak[2], shift[2], total[2][2];
};

// Logits become -inf where a row does not see the key: of the keys from..to-1 it sees those up to its own position that lie
// less than ``reach`` before it or among the first ``n_init``. Keys of all_from..all_to are seen by all rows.
__device__ __forceinline__ void mask_tile(float (&s)[32], const Rows& r, int first, int from, int to, int reach, int n_init,
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
        s[e] = seen ? s[e] : NONE;
      }
    }
  }
}

// One step of the online softmax: logits become probabilities. True if a peak grew; ``shrink`` is then what the old rows are
// worth. A peak that grows by little stays what it was: any number near it serves, and few steps need to touch the output.
__device__ __forceinline__ bool softmax(float (&s)[KEYS / 2], Rows& r, float scale_log2, float (&shrink)[2]) {
  float peak[2];
#pragma unroll
  for (int row = 0; row < 2; row++) {
    float top[4];
#pragma unroll
    for (int e = 0; e < 4; e++) top[e] = s[2 * row + (e & 1) + 4 * (e >> 1)];
#pragma unroll
    for (int g = 2; g < KEYS / 8; g += 2)
#pragma unroll
      for (int e = 0; e < 4; e++) top[e] = fmaxf(top[e], s[4 * g + 2 * row + (e & 1) + 4 * (e >> 1)]);
    peak[row] = fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3]));
  }
  // Each of the four threads of a row asks for its own keys: they tell one another only where a peak grew.
  const bool grows = __any_sync(~0u, (peak[0] * scale_log2 > r.peak[0] + SLACK) | (peak[1] * scale_log2 > r.peak[1] + SLACK));
  if (grows) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
#pragma unroll
      for (int x = 1; x <= 2; x++) peak[row] = fmaxf(peak[row], __shfl_xor_sync(~0u, peak[row], x));
      const float top = fmaxf(peak[row] * scale_log2, r.peak[row]);
      // A row that has seen no key yet has a peak of -inf, and -inf - -inf is not a number.
      r.shift[row] = top == NONE ? 0.0f : top;
      shrink[row] = exp2_fast(r.peak[row] - r.shift[row]);
      r.peak[row] = top;
      r.total[row][0] *= shrink[row];
      r.total[row][1] *= shrink[row];
    }
  }
#pragma unroll
  for (int e = 0; e < KEYS / 2; e++) {
    const int row = (e >> 1) & 1;
    s[e] = exp2_fast(__fmaf_rn(s[e], scale_log2, -r.shift[row]));
    r.total[row][e & 1] += s[e];
  }
  return grows;
}

__device__ __forceinline__ void to_operand(const float (&s)[KEYS / 2], u32 (&operand)[KEYS / 4]) {
#pragma unroll
  for (int g = 0; g < KEYS / 4; g++) operand[g] = pack(s[2 * g], s[2 * g + 1]);
}

__device__ __forceinline__ void multiply_keys(float (&s)[KEYS / 2], u32 q, u32 k) {
#pragma unroll
  for (int h = 0; h < DIM / 64; h++)
#pragma unroll
    for (int x = 0; x < 4; x++)
      mma_ss(s, describe(q + h * Q_HALF + 32 * x, 16), describe(k + h * K_HALF + 32 * x, 16), h + x);
}
__device__ __forceinline__ void multiply_values(float (&o)[V_DIM / 2], const u32 (&operand)[KEYS / 4], u32 v, int add) {
#pragma unroll
  for (int x = 0; x < KEYS / 16; x++) mma_rs(o, operand + 4 * x, describe(v + 2048 * x, K_HALF), x ? 1 : add);
}

// What the outputs of a thread's two rows are multiplied with; ``total`` becomes that of the whole row.
__device__ __forceinline__ void normalizers(float (&total)[2], float (&factor)[2]) {
#pragma unroll
  for (int row = 0; row < 2; row++) {
    total[row] += __shfl_xor_sync(~0u, total[row], 1);
    total[row] += __shfl_xor_sync(~0u, total[row], 2);
    // A row that sees no key gets zeros.
    factor[row] = total[row] == 0.0f ? 0.0f : __fdividef(1.0f, total[row]);
  }
}

// Leave the output in the slot that held the team's queries, as tiles that the copy engine takes.
__device__ __forceinline__ void stage(const float (&o)[V_DIM / 2], const float (&factor)[2], int team, int warp, u32 slot_at) {
  const int lane = threadIdx.x & 31;
  const u32 to = slot_at + warp * 2048;
  // All warps of the team must be done with the queries.
  asm volatile("bar.sync %0, 128;" ::"r"(1 + team) : "memory");
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
