// Triangle attention on Hopper: a thread that loads and three teams of four warps that compute, side by side for as long as
// the launch lasts. docs/triangle-kernel.md tells why it is built so.
//
// Each program goes from item to item: a tile of query rows that share a key head, over the keys of their windows and the
// sinks, or over a part of all keys for the last rows. A team owns TEAM_ROWS of the rows; all teams share every tile of keys.
// Macros beside those of hopper.cuh: TEAMS; BOX, keys of a box; SHARED_BYTES.

#include "hopper.cuh"

constexpr int EDGE = KEYS - BOX;  // a mixed tile is so many of the window's last keys, and a box of sinks
constexpr u32 UNITS_AT = 2 * TEAMS * SLOT_BYTES;
constexpr u32 BARS_AT = UNITS_AT + UNITS * UNIT_BYTES;
constexpr u32 ITEMS_AT = BARS_AT + 256;
constexpr u32 Q_FULL = 0, Q_EMPTY = 2, FULL = 4, EMPTY = FULL + UNITS;

struct Maps { TensorMap q, k, v, k_box, v_box, out_band, out_last; };
struct Plan {
  float* part_out;
  float* part_lse;
  int length, tail, n_init, n_local, part_keys, parts, last_tiles, batches, last_items, band_items, extra_from, rounds;
  int heads, tile_heads, groups, head_shift, v_dim;
  float scale_log2;
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

// As mask_tile, for a mixed tile: the window's last keys, from i.low on, and behind them the sinks.
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

__device__ __forceinline__ void write(const Plan& p, const Item& i, float (&total)[2], const float (&peak)[2],
                                      float (&o)[V_DIM / 2], int team, int warp, u32 slot_at) {
  const int lane = threadIdx.x & 31;
  float factor[2];
  normalizers(total, factor);
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
  stage(o, factor, team, warp, slot_at);
}

// Hand the output that ``stage`` left in its slot over to the copy engine.
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
