// Triangle attention on Hopper: a thread that loads and three teams of four warps that compute, side by side for as long as
// the launch lasts. docs/triangle-kernel.md tells why it is built so.
//
// Each program goes from item to item: a tile of query rows that share a key head, over the keys of their windows and the
// sinks, or over a part of all keys for the last rows. A team owns TEAM_ROWS of the rows; all teams share every tile of keys.
// The host gives, as macros: DIM and V_DIM, head sizes as multiples of 64; HALF, 1 for fp16 and 0 for bf16; TEAMS, TEAM_ROWS,
// KEYS, BOX and UNITS, the sizes of tiles and how many of them are in flight; SHARED_BYTES.

using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int EDGE = KEYS - BOX;  // a mixed tile is so many of the window's last keys, and a box of sinks
constexpr float SLACK = 8.0f;     // how far, in powers of two, a logit may rise above the peak that is subtracted
constexpr u32 Q_HALF = TEAM_ROWS * 128;
constexpr u32 K_HALF = KEYS * 128;
constexpr u32 Q_BYTES = Q_HALF * (DIM / 64);  // of one team
constexpr u32 UNIT_BYTES = K_HALF * ((DIM > V_DIM ? DIM : V_DIM) / 64);
constexpr u32 SLOT_BYTES = Q_HALF * ((DIM > V_DIM ? DIM : V_DIM) / 64);  // a team's queries, and later its output
constexpr u32 UNITS_AT = 2 * TEAMS * SLOT_BYTES;
constexpr u32 BARS_AT = UNITS_AT + UNITS * UNIT_BYTES;
constexpr u32 ITEMS_AT = BARS_AT + 256;
constexpr u32 Q_FULL = 0, Q_EMPTY = 2, FULL = 4, EMPTY = FULL + UNITS;

struct alignas(64) TensorMap { u64 words[16]; };
struct Maps { TensorMap q, k, v, k_box, v_box, out_band, out_last; };
struct Plan {
  float* part_out;
  float* part_lse;
  int length, tail, n_init, n_local, part_keys, parts, last_tiles, batches, last_items, band_items, extra_from, rounds;
  int heads, tile_heads, groups, head_shift, v_dim;
  float scale_log2;
};

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

// ------------------------------------------------------------------------------------------------------------ the items

struct alignas(16) Item {
  int more, is_last, head_tile, batch, part, start, low, high, bottom, reach, whole, edge_end, sinks, plain, tiles, spare;
};

__device__ __forceinline__ void share(const Plan& p, int& lasts, int& count) {
  const int program = blockIdx.x, programs = gridDim.x;
  lasts = max((p.last_items - program + programs - 1) / programs, 0);
  const int alone = programs - p.extra_from;
  const int late = max((p.band_items - p.rounds * programs - (program - p.extra_from) + alone - 1) / alone, 0);
  count = lasts + p.rounds + (program < p.extra_from ? 0 : late);
}

__device__ __forceinline__ Item item_at(const Plan& p, int n, int lasts) {
  const int program = blockIdx.x, programs = gridDim.x, positions = (TEAMS * TEAM_ROWS) >> p.head_shift;
  const int head_tiles = p.heads / p.tile_heads;
  Item i;
  i.is_last = n < lasts;
  int rest;
  if (i.is_last) {
    rest = n * programs + program;
  } else {
    const int b = n - lasts;
    rest = b < p.rounds ? b * programs + program
                        : p.rounds * programs + (b - p.rounds) * (programs - p.extra_from) + program - p.extra_from;
  }
  i.head_tile = rest % head_tiles;
  rest /= head_tiles;
  i.batch = rest % p.batches;
  rest /= p.batches;
  i.part = i.is_last ? rest / p.last_tiles : 0;
  i.start = (i.is_last ? p.tail + rest % p.last_tiles * positions : rest * positions);
  i.high = min(i.start + positions, p.length);
  if (i.is_last) {
    i.low = i.part * p.part_keys;
    i.high = min(i.high, i.low + p.part_keys);
    i.bottom = i.low;
    i.reach = p.length;
  } else {
    i.low = max(i.start - p.n_local + 1, 0);
    i.bottom = 0;
    i.reach = p.n_local;
  }
  // Whole tiles go down from the diagonal; what is left of the window fits in a mixed tile, or is nothing.
  i.whole = max((i.high - i.low - EDGE + KEYS - 1) / KEYS, 1);
  i.edge_end = i.high - i.whole * KEYS;
  i.sinks = i.is_last ? 0 : min(p.n_init, max(min(i.low, i.edge_end), 0));
  const int sink_tiles = i.sinks > BOX ? (i.sinks + KEYS - 1) / KEYS : 0;
  i.plain = i.whole + sink_tiles;
  i.tiles = i.plain + (i.edge_end > i.low || (i.sinks > 0 && sink_tiles == 0));
  return i;
}

// ------------------------------------------------------------------------------------------------------------ the loader

template <int DIMS> __device__ __forceinline__ void load_unit(const Item& i, int t, const TensorMap* map, const TensorMap* box,
                                                              int kv_head, Ring& ring, u32 smem) {
  const u32 full = smem + BARS_AT + 8 * (FULL + ring.at()), to = smem + UNITS_AT + ring.at() * UNIT_BYTES;
  bar_wait(smem + BARS_AT + 8 * (EMPTY + ring.at()), ring.phase() ^ 1);
  ring.count++;
  bar_expect(full, K_HALF * (DIMS / 64));
  if (t < i.plain) {
    const int first = t < i.whole ? i.high - (t + 1) * KEYS : (i.plain - 1 - t) * KEYS;
#pragma unroll
    for (int h = 0; h < DIMS / 64; h++) load_4d(to + h * K_HALF, map, full, h * 64, first, kv_head, i.batch);
  } else {
#pragma unroll
    for (int h = 0; h < DIMS / 64; h++)
#pragma unroll
      for (int b = 0; b < KEYS / BOX; b++)
        load_4d(to + h * K_HALF + b * BOX * 128, box, full, h * 64, b < EDGE / BOX ? i.low + b * BOX : 0, kv_head, i.batch);
  }
}

__device__ __forceinline__ int kv_head_of(const Plan& p, const Item& i) { return i.head_tile * p.tile_heads / p.groups; }

__device__ __forceinline__ void load_last_values(const Maps& maps, const Plan& p, const Item& i, Ring& ring, u32 smem) {
  load_unit<V_DIM>(i, i.tiles - 1, &maps.v, &maps.v_box, kv_head_of(p, i), ring, smem);
}

__device__ void load(const Maps& maps, const Plan& p, u32 smem, Item* items) {
  const u32 bars = smem + BARS_AT;
  int lasts, count;
  share(p, lasts, count);
  Ring ring = {0};
  for (int n = 0; n < count; n++) {
    Item i = item_at(p, n, lasts);
    i.more = n + 1 < count;
    const int kv_head = kv_head_of(p, i);
    const u32 turn = n & 1;
    bar_wait(bars + 8 * (Q_EMPTY + turn), ((n >> 1) & 1) ^ 1);
    items[turn] = i;
    bar_expect(bars + 8 * (Q_FULL + turn), TEAMS * Q_BYTES);
    for (int team = 0; team < TEAMS; team++)
#pragma unroll
      for (int h = 0; h < DIM / 64; h++)
        load_5d(smem + (turn * TEAMS + team) * SLOT_BYTES + h * Q_HALF, &maps.q, bars + 8 * (Q_FULL + turn), h * 64, 0,
                i.head_tile, i.start + team * (TEAM_ROWS >> p.head_shift), i.batch);
    for (int t = 0; t < i.tiles; t++) {
      load_unit<DIM>(i, t, &maps.k, &maps.k_box, kv_head, ring, smem);
      if (t > 0)
        load_unit<V_DIM>(i, t - 1, &maps.v, &maps.v_box, kv_head, ring, smem);
      else if (n > 0)
        load_last_values(maps, p, items[turn ^ 1], ring, smem);
    }
  }
  if (count > 0) load_last_values(maps, p, items[(count - 1) & 1], ring, smem);
}

// ------------------------------------------------------------------------------------------------------------- the teams

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

// The same for a mixed tile: the window's last keys, from i.low on, and behind them the sinks.
__device__ __forceinline__ void mask_mixed(float (&s)[32], const Rows& r, const Item& i, int n_init) {
  const int column = 2 * (threadIdx.x & 3), base = i.low + column;
  const int sinks = (i.plain > i.whole ? 0 : i.sinks) - column;
  int low[2], high[2];
#pragma unroll
  for (int row = 0; row < 2; row++) {
    high[row] = min(r.position[row], i.edge_end - 1) - base;
    low[row] = max(r.position[row] - i.reach + 1, i.bottom) - base;
  }
#pragma unroll
  for (int e = 0; e < KEYS / 2; e++) {
    const int c = 8 * (e >> 2) + (e & 1), row = (e >> 1) & 1;
    const bool seen = c < EDGE ? (c <= high[row]) & ((c >= low[row]) | (base + c < n_init)) : c - EDGE < sinks;
    s[e] = seen ? s[e] : NONE;
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
#pragma unroll
  for (int x = 1; x <= 2; x++)
#pragma unroll
    for (int row = 0; row < 2; row++) peak[row] = fmaxf(peak[row], __shfl_xor_sync(~0u, peak[row], x));
  const bool grows = __any_sync(~0u, (peak[0] * scale_log2 > r.peak[0] + SLACK) | (peak[1] * scale_log2 > r.peak[1] + SLACK));
  if (grows) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
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

__device__ __forceinline__ void write(const Plan& p, const Item& i, float (&total)[2], const float (&peak)[2],
                                      float (&o)[V_DIM / 2], int team, int warp, u32 slot_at) {
  const int lane = threadIdx.x & 31;
  float factor[2];
#pragma unroll
  for (int row = 0; row < 2; row++) {
    total[row] += __shfl_xor_sync(~0u, total[row], 1);
    total[row] += __shfl_xor_sync(~0u, total[row], 2);
    // A row that sees no key gets zeros.
    factor[row] = total[row] == 0.0f ? 0.0f : __fdividef(1.0f, total[row]);
  }
  const int team_start = i.start + team * (TEAM_ROWS >> p.head_shift);
  if (i.is_last && p.parts > 1) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const int at = warp * 16 + (lane >> 2) + 8 * row;
      const int position = team_start + (at >> p.head_shift), head = at & ((1 << p.head_shift) - 1);
      if (position < p.length && head < p.tile_heads) {
        const u64 slot = (u64(i.part * p.batches + i.batch) * (p.length - p.tail) + (position - p.tail)) * p.heads +
                         i.head_tile * p.tile_heads + head;
        if ((lane & 3) == 0) p.part_lse[slot] = total[row] == 0.0f ? NONE : peak[row] + __log2f(total[row]);
#pragma unroll
        for (int g = 0; g < V_DIM / 8; g++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int column = 8 * g + 2 * (lane & 3) + e;
            if (column < p.v_dim) p.part_out[slot * p.v_dim + column] = o[4 * g + 2 * row + e] * factor[row];
          }
      }
    }
    return;
  }
  const u32 to = slot_at + warp * 2048;
  // The slot held the queries, and all warps of the team must be done with them.
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

// Hand the output that ``write`` left in its slot over to the copy engine.
__device__ __forceinline__ void send(const Maps& maps, const Plan& p, const Item& i, int team, int warp, u32 slot_at) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  if ((threadIdx.x & 31) == 0 && !(i.is_last && p.parts > 1)) {
    const int position = i.start + ((team * TEAM_ROWS + warp * 16) >> p.head_shift);
    const TensorMap* map = i.is_last ? &maps.out_last : &maps.out_band;
#pragma unroll
    for (int h = 0; h < V_DIM / 64; h++)
      store_5d(map, slot_at + warp * 2048 + h * Q_HALF, h * 64, 0, i.head_tile, position, i.batch);
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  }
}

__device__ void compute(const Maps& maps, const Plan& p, u32 smem, const Item* items, int team, int warp) {
  const u32 bars = smem + BARS_AT;
  const int lane = threadIdx.x & 31, piece = TEAM_ROWS >> p.head_shift;
  const int row = (warp * 16 + (lane >> 2)) >> p.head_shift, row_8 = (warp * 16 + (lane >> 2) + 8) >> p.head_shift;
  float s[KEYS / 2], o[V_DIM / 2], shrink[2], total[2], peak[2];
  u32 operand[KEYS / 4];
  Rows r;
  Ring ring = {0};
  int n = 0, t = 0, tiles, whole, plain, reach, first, from, free_from, to, free_to;
  int leaving = 0;  // the output before: 2, it lies in its slot; 1, it is on its way; 0, its slot is free

  const auto slot = [&](int n) { return smem + ((n & 1) * TEAMS + team) * SLOT_BYTES; };
  const auto begin = [&]() {
    const Item& i = items[n & 1];
    const int start = i.start + team * piece;
    r.position[0] = start + row;
    r.position[1] = start + row_8;
#pragma unroll
    for (int x = 0; x < 2; x++) r.peak[x] = NONE, r.shift[x] = r.total[x][0] = r.total[x][1] = 0.0f;
    t = 0, tiles = i.tiles, whole = i.whole, plain = i.plain, reach = i.reach;
    to = i.high, first = to - KEYS, from = i.bottom;
    free_from = max(start + piece - reach, from), free_to = start;
  };
  const auto mask = [&]() {
    if ((t == plain) | (first < free_from) | (first + KEYS - 1 > free_to)) {
      if (t == plain)
        mask_mixed(s, r, items[n & 1], p.n_init);
      else
        mask_tile(s, r, first, from, to, reach, p.n_init, free_from, free_to);
    }
  };
  // Outputs leave late, so that nothing waits for them: one step after the last product they are sent, another step later
  // their slot is free for queries again.
  const auto leave = [&]() {
    if (leaving == 2) {
      send(maps, p, items[(n & 1) ^ 1], team, warp, slot(n - 1));
    } else if (lane == 0) {
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
      bar_arrive(bars + 8 * (Q_EMPTY + ((n & 1) ^ 1)));
    }
    leaving--;
  };

  bar_wait(bars + 8 * Q_FULL, 0);
  begin();
  bar_wait(bars + 8 * FULL, 0);
  mma_fence();
  multiply_keys(s, slot(0), smem + UNITS_AT);
  mma_commit();
  mma_wait<0>();
  pin(s);
  if (lane == 0) bar_arrive(bars + 8 * EMPTY);
  ring.count++;
  mask();
  softmax(s, r, p.scale_log2, shrink);
  to_operand(s, operand);
  while (true) {
    // Here ``operand`` holds the probabilities of tile t. The product of the next tile's keys, which may be the next item's,
    // and that of this tile's values run together, and the softmax of the former overlaps with the latter.
    const int add = t;
    bool last = false;
    t++;
    first -= KEYS;
    if ((t == tiles) | (t == whole)) {
      if (t == tiles) {
        if (!items[n & 1].more) break;
        last = true;
#pragma unroll 1
        while (leaving) leave();
#pragma unroll
        for (int x = 0; x < 2; x++) total[x] = r.total[x][0] + r.total[x][1], peak[x] = r.peak[x];
        n++;
        bar_wait(bars + 8 * (Q_FULL + (n & 1)), (n >> 1) & 1);
        begin();
      } else {
        first = (plain - whole - 1) * KEYS;
        from = free_from = 0;
        to = items[n & 1].sinks, free_to = to - 1;
      }
    }
    const u32 k_at = ring.at();
    bar_wait(bars + 8 * (FULL + k_at), ring.phase());
    ring.count++;
    mma_fence();
    multiply_keys(s, slot(n), smem + UNITS_AT + k_at * UNIT_BYTES);
    mma_commit();
    const u32 v_at = ring.at(), v_phase = ring.phase();
    bar_wait(bars + 8 * (FULL + v_at), v_phase);
    ring.count++;
    multiply_values(o, operand, smem + UNITS_AT + v_at * UNIT_BYTES, add);
    mma_commit();
    mma_wait<1>();
    pin(s);
    if (lane == 0) bar_arrive(bars + 8 * (EMPTY + k_at));
    mask();
    const bool grows = softmax(s, r, p.scale_log2, shrink);
    // A loop on a barrier, which the assembler moves no arithmetic across: the softmax overlaps with the product of values.
    bar_wait(bars + 8 * (FULL + v_at), v_phase);
    mma_wait<0>();
    pin(o);
    if (lane == 0) bar_arrive(bars + 8 * (EMPTY + v_at));
    if (last | grows | (leaving > 0)) {
      if (last) {
        write(p, items[(n & 1) ^ 1], total, peak, o, team, warp, slot(n - 1));
        leaving = 2;
      } else {
        if (grows) {
#pragma unroll
          for (int e = 0; e < V_DIM / 2; e++) o[e] *= shrink[(e >> 1) & 1];
        }
        if (leaving) leave();
      }
    }
    to_operand(s, operand);
  }
#pragma unroll 1
  while (leaving) leave();
  bar_wait(bars + 8 * (FULL + ring.at()), ring.phase());
  mma_fence();
  multiply_values(o, operand, smem + UNITS_AT + ring.at() * UNIT_BYTES, t - 1);
  mma_commit();
  mma_wait<0>();
  pin(o);
#pragma unroll
  for (int x = 0; x < 2; x++) total[x] = r.total[x][0] + r.total[x][1];
  write(p, items[n & 1], total, r.peak, o, team, warp, slot(n));
  send(maps, p, items[n & 1], team, warp, slot(n));
  if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

static_assert(ITEMS_AT + 2 * sizeof(Item) <= SHARED_BYTES, "shared memory");

extern "C" __global__ void __launch_bounds__(128 + 128 * TEAMS, 1) triangle(const __grid_constant__ Maps maps, const __grid_constant__ Plan p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const u32 smem = u32(__cvta_generic_to_shared(memory)), bars = smem + BARS_AT;
  if (threadIdx.x == 0) {
    for (int b = 0; b < 2; b++) {
      bar_init(bars + 8 * (Q_FULL + b), 1);
      bar_init(bars + 8 * (Q_EMPTY + b), 4 * TEAMS);
    }
    for (int b = 0; b < UNITS; b++) {
      bar_init(bars + 8 * (FULL + b), 1);
      bar_init(bars + 8 * (EMPTY + b), 4 * TEAMS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  Item* items = reinterpret_cast<Item*>(memory + ITEMS_AT);
  int lasts, count;
  share(p, lasts, count);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), group = warp >> 2;
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    if (threadIdx.x == 0) load(maps, p, smem, items);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    if (count) compute(maps, p, smem, items, group - 1, warp & 3);
  }
}
