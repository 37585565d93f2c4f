// Triangle attention on Hopper, persistent and warp-specialised: one producer thread and two or three consumer warpgroups a
// program.
// docs/triangle-kernel.md tells why it is built so.
//
// A work tile is query rows that share a key head, over the keys of their windows and the sinks, or over one split of all keys
// for the last rows. Each consumer owns WARPGROUP_ROWS of the rows; all consumers share every tile of keys.
// Macros beside those of hopper.cuh: BOX, keys of a box; SHARED_BYTES.

#include "hopper.cuh"

constexpr int EDGE = KEYS - BOX;  // a mixed tile is so many of the window's last keys, and a box of sinks
constexpr u32 STAGES_AT = 2 * CONSUMERS * SLOT_BYTES;
constexpr u32 BARRIERS_AT = STAGES_AT + STAGES * STAGE_BYTES;
constexpr u32 WORK_TILES_AT = BARRIERS_AT + 256;
constexpr u32 Q_FULL = 0, Q_EMPTY = 2, FULL = 4, EMPTY = FULL + STAGES;

struct Maps { TensorMap q, k, v, k_box, v_box, out_band, out_last; };
struct Plan {
  float* split_out;
  float* split_lse;
  int length, first_query, tail, n_init, n_local, split_keys, splits, last_tiles, batches, last_items, band_items, extra_from, rounds;
  int heads, tile_heads, groups, head_shift, v_dim;
  float scale_log2;
  float* lse;  // [batch, heads, queries], where LSE is 1
};


struct alignas(16) WorkTile {
  int more, is_last, head_tile, batch, split, start, low, high, bottom, reach, whole, edge_end, sinks, plain, tiles, spare;
};

__device__ __forceinline__ void schedule(const Plan& p, int& lasts, int& count) {
  const int program = blockIdx.x, programs = gridDim.x;
  lasts = max((p.last_items - program + programs - 1) / programs, 0);
  const int alone = programs - p.extra_from;
  const int late = max((p.band_items - p.rounds * programs - (program - p.extra_from) + alone - 1) / alone, 0);
  count = lasts + p.rounds + (program < p.extra_from ? 0 : late);
}

__device__ __forceinline__ WorkTile work_tile_at(const Plan& p, int n, int lasts) {
  const int program = blockIdx.x, programs = gridDim.x, positions = (CONSUMERS * WARPGROUP_ROWS) >> p.head_shift;
  const int head_tiles = p.heads / p.tile_heads;
  WorkTile i;
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
  i.split = i.is_last ? rest / p.last_tiles : 0;
  i.start = (i.is_last ? p.tail + rest % p.last_tiles * positions : p.first_query + rest * positions);
  i.high = min(i.start + positions, p.length);
  if (i.is_last) {
    i.low = i.split * p.split_keys;
    i.high = min(i.high, i.low + p.split_keys);
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


template <int DIMS> __device__ __forceinline__ void load_stage(const WorkTile& i, int t, const TensorMap* map, const TensorMap* box,
                                                              int kv_head, PipelineState& pipe, u32 smem) {
  const u32 full = smem + BARRIERS_AT + 8 * (FULL + pipe.index()), to = smem + STAGES_AT + pipe.index() * STAGE_BYTES;
  mbarrier_wait(smem + BARRIERS_AT + 8 * (EMPTY + pipe.index()), pipe.phase() ^ 1);
  pipe.count++;
  mbarrier_expect(full, K_HALF * (DIMS / 64));
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

__device__ __forceinline__ int kv_head_of(const Plan& p, const WorkTile& i) { return i.head_tile * p.tile_heads / p.groups; }

__device__ __forceinline__ void load_last_values(const Maps& maps, const Plan& p, const WorkTile& i, PipelineState& pipe, u32 smem) {
  load_stage<V_DIM>(i, i.tiles - 1, &maps.v, &maps.v_box, kv_head_of(p, i), pipe, smem);
}

__device__ void produce(const Maps& maps, const Plan& p, u32 smem, WorkTile* work_tiles) {
  const u32 barriers = smem + BARRIERS_AT;
  int lasts, count;
  schedule(p, lasts, count);
  PipelineState pipe = {0};
  for (int n = 0; n < count; n++) {
    WorkTile i = work_tile_at(p, n, lasts);
    i.more = n + 1 < count;
    const int kv_head = kv_head_of(p, i);
    const u32 turn = n & 1;
    mbarrier_wait(barriers + 8 * (Q_EMPTY + turn), ((n >> 1) & 1) ^ 1);
    work_tiles[turn] = i;
    mbarrier_expect(barriers + 8 * (Q_FULL + turn), CONSUMERS * Q_BYTES);
    for (int warpgroup = 0; warpgroup < CONSUMERS; warpgroup++)
#pragma unroll
      for (int h = 0; h < DIM / 64; h++)
        load_5d(smem + (turn * CONSUMERS + warpgroup) * SLOT_BYTES + h * Q_HALF, &maps.q, barriers + 8 * (Q_FULL + turn), h * 64, 0,
                i.head_tile, i.start - p.first_query + warpgroup * (WARPGROUP_ROWS >> p.head_shift), i.batch);
    for (int t = 0; t < i.tiles; t++) {
      load_stage<DIM>(i, t, &maps.k, &maps.k_box, kv_head, pipe, smem);
      if (t > 0)
        load_stage<V_DIM>(i, t - 1, &maps.v, &maps.v_box, kv_head, pipe, smem);
      else if (n > 0)
        load_last_values(maps, p, work_tiles[turn ^ 1], pipe, smem);
    }
  }
  if (count > 0) load_last_values(maps, p, work_tiles[(count - 1) & 1], pipe, smem);
}


// As mask_tile, for a mixed tile: the window's last keys, from i.low on, and behind them the sinks.
__device__ __forceinline__ void mask_mixed(float (&s)[32], const SoftmaxState& r, const WorkTile& i, int n_init) {
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
    s[e] = seen ? s[e] : NEG_INFINITY;
  }
}

__device__ __forceinline__ void write(const Plan& p, const WorkTile& i, float (&row_sum)[2], const float (&row_max)[2],
                                      float (&o)[V_DIM / 2], int warpgroup, int warp, u32 slot_at) {
  const int lane = threadIdx.x & 31;
  float factor[2];
  output_scale(row_sum, factor);
  const int warpgroup_start = i.start + warpgroup * (WARPGROUP_ROWS >> p.head_shift);
  if (i.is_last && p.splits > 1) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const int at = warp * 16 + (lane >> 2) + 8 * row;
      const int position = warpgroup_start + (at >> p.head_shift), head = at & ((1 << p.head_shift) - 1);
      if (position < p.length && head < p.tile_heads) {
        const u64 slot = (u64(i.split * p.batches + i.batch) * (p.length - p.tail) + (position - p.tail)) * p.heads +
                         i.head_tile * p.tile_heads + head;
        if ((lane & 3) == 0) p.split_lse[slot] = row_sum[row] == 0.0f ? NEG_INFINITY : row_max[row] + __log2f(row_sum[row]);
#pragma unroll
        for (int g = 0; g < V_DIM / 8; g++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int column = 8 * g + 2 * (lane & 3) + e;
            if (column < p.v_dim) p.split_out[slot * p.v_dim + column] = o[4 * g + 2 * row + e] * factor[row];
          }
      }
    }
    return;
  }
#if LSE
  if ((lane & 3) == 0) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const int at = warp * 16 + (lane >> 2) + 8 * row;
      const int position = warpgroup_start + (at >> p.head_shift), head = at & ((1 << p.head_shift) - 1);
      // A tile of the band may reach into the last rows, which are not its own.
      if (position < (i.is_last ? p.length : p.tail) && head < p.tile_heads)
        p.lse[(u64(i.batch) * p.heads + i.head_tile * p.tile_heads + head) * (p.length - p.first_query) + position - p.first_query] =
            log_sum_exp(row_max[row], row_sum[row]);
    }
  }
#endif
  stage_output(o, factor, warpgroup, warp, slot_at);
}

// Start the store of the output that ``stage_output`` wrote to its slot.
__device__ __forceinline__ void send(const Maps& maps, const Plan& p, const WorkTile& i, int warpgroup, int warp, u32 slot_at) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  if ((threadIdx.x & 31) == 0 && !(i.is_last && p.splits > 1)) {
    const int query = i.start - p.first_query + ((warpgroup * WARPGROUP_ROWS + warp * 16) >> p.head_shift);
    const TensorMap* map = i.is_last ? &maps.out_last : &maps.out_band;
#pragma unroll
    for (int h = 0; h < V_DIM / 64; h++)
      store_5d(map, slot_at + warp * 2048 + h * Q_HALF, h * 64, 0, i.head_tile, query, i.batch);
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  }
}

__device__ void consume(const Maps& maps, const Plan& p, u32 smem, const WorkTile* work_tiles, int warpgroup, int warp) {
  const u32 barriers = smem + BARRIERS_AT;
  const int lane = threadIdx.x & 31, piece = WARPGROUP_ROWS >> p.head_shift;
  const int row = (warp * 16 + (lane >> 2)) >> p.head_shift, row_8 = (warp * 16 + (lane >> 2) + 8) >> p.head_shift;
  float s[KEYS / 2], o[V_DIM / 2], acc_scale[2], row_sum[2], row_max[2];
  u32 probabilities[KEYS / 4];
  SoftmaxState r;
  PipelineState pipe = {0};
  int n = 0, t = 0, tiles, whole, plain, reach, first, from, free_from, to, free_to;
  int storing = 0;  // the output before: 2, written to its slot; 1, its store is under way; 0, its slot is free

  const auto slot = [&](int n) { return smem + ((n & 1) * CONSUMERS + warpgroup) * SLOT_BYTES; };
  const auto begin = [&]() {
    const WorkTile& i = work_tiles[n & 1];
    const int start = i.start + warpgroup * piece;
    r.position[0] = start + row;
    r.position[1] = start + row_8;
#pragma unroll
    for (int x = 0; x < 2; x++) r.row_max[x] = NEG_INFINITY, r.shift[x] = r.row_sum[x][0] = r.row_sum[x][1] = 0.0f;
    t = 0, tiles = i.tiles, whole = i.whole, plain = i.plain, reach = i.reach;
    to = i.high, first = to - KEYS, from = i.bottom;
    free_from = max(start + piece - reach, from), free_to = start;
  };
  const auto mask = [&]() {
    if ((t == plain) | (first < free_from) | (first + KEYS - 1 > free_to)) {
      if (t == plain)
        mask_mixed(s, r, work_tiles[n & 1], p.n_init);
      else
        mask_tile(s, r, first, from, to, reach, p.n_init, free_from, free_to);
    }
  };
  // Outputs are stored late, so that nothing waits for them: the store starts one step after the last product, and one step
  // later the slot is free for queries.
  const auto advance_store = [&]() {
    if (storing == 2) {
      send(maps, p, work_tiles[(n & 1) ^ 1], warpgroup, warp, slot(n - 1));
    } else if (lane == 0) {
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
      mbarrier_arrive(barriers + 8 * (Q_EMPTY + ((n & 1) ^ 1)));
    }
    storing--;
  };

  mbarrier_wait(barriers + 8 * Q_FULL, 0);
  begin();
  mbarrier_wait(barriers + 8 * FULL, 0);
  wgmma_fence();
  gemm_qk(s, slot(0), smem + STAGES_AT);
  wgmma_commit();
  wgmma_wait<0>();
  fence_operand(s);
  if (lane == 0) mbarrier_arrive(barriers + 8 * EMPTY);
  pipe.count++;
  mask();
  softmax(s, r, p.scale_log2, acc_scale);
  to_operand(s, probabilities);
  while (true) {
    // ``probabilities`` are those of tile t. QK of the next tile, perhaps of the next work tile, and PV of this one run
    // together, and the softmax of the former overlaps with the latter.
    const int add = t;
    bool last = false;
    t++;
    first -= KEYS;
    if ((t == tiles) | (t == whole)) {
      if (t == tiles) {
        if (!work_tiles[n & 1].more) break;
        last = true;
#pragma unroll 1
        while (storing) advance_store();
#pragma unroll
        for (int x = 0; x < 2; x++) row_sum[x] = r.row_sum[x][0] + r.row_sum[x][1], row_max[x] = r.row_max[x];
        n++;
        mbarrier_wait(barriers + 8 * (Q_FULL + (n & 1)), (n >> 1) & 1);
        begin();
      } else {
        first = (plain - whole - 1) * KEYS;
        from = free_from = 0;
        to = work_tiles[n & 1].sinks, free_to = to - 1;
      }
    }
    const u32 k_at = pipe.index();
    mbarrier_wait(barriers + 8 * (FULL + k_at), pipe.phase());
    pipe.count++;
    wgmma_fence();
    gemm_qk(s, slot(n), smem + STAGES_AT + k_at * STAGE_BYTES);
    wgmma_commit();
    const u32 v_at = pipe.index(), v_phase = pipe.phase();
    mbarrier_wait(barriers + 8 * (FULL + v_at), v_phase);
    pipe.count++;
    gemm_pv(o, probabilities, smem + STAGES_AT + v_at * STAGE_BYTES, add);
    wgmma_commit();
    wgmma_wait<1>();
    fence_operand(s);
    if (lane == 0) mbarrier_arrive(barriers + 8 * (EMPTY + k_at));
    mask();
    const bool grows = softmax(s, r, p.scale_log2, acc_scale);
    // A loop on a barrier, which the assembler moves no arithmetic across: the softmax overlaps with PV.
    mbarrier_wait(barriers + 8 * (FULL + v_at), v_phase);
    wgmma_wait<0>();
    fence_operand(o);
    if (lane == 0) mbarrier_arrive(barriers + 8 * (EMPTY + v_at));
    if (last | grows | (storing > 0)) {
      if (last) {
        write(p, work_tiles[(n & 1) ^ 1], row_sum, row_max, o, warpgroup, warp, slot(n - 1));
        storing = 2;
      } else {
        if (grows) {
#pragma unroll
          for (int e = 0; e < V_DIM / 2; e++) o[e] *= acc_scale[(e >> 1) & 1];
        }
        if (storing) advance_store();
      }
    }
    to_operand(s, probabilities);
  }
#pragma unroll 1
  while (storing) advance_store();
  mbarrier_wait(barriers + 8 * (FULL + pipe.index()), pipe.phase());
  wgmma_fence();
  gemm_pv(o, probabilities, smem + STAGES_AT + pipe.index() * STAGE_BYTES, t - 1);
  wgmma_commit();
  wgmma_wait<0>();
  fence_operand(o);
#pragma unroll
  for (int x = 0; x < 2; x++) row_sum[x] = r.row_sum[x][0] + r.row_sum[x][1];
  write(p, work_tiles[n & 1], row_sum, r.row_max, o, warpgroup, warp, slot(n));
  send(maps, p, work_tiles[n & 1], warpgroup, warp, slot(n));
  if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

static_assert(WORK_TILES_AT + 2 * sizeof(WorkTile) <= SHARED_BYTES, "shared memory");

extern "C" __global__ void __launch_bounds__(128 + 128 * CONSUMERS, 1) triangle(const __grid_constant__ Maps maps, const __grid_constant__ Plan p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const u32 smem = u32(__cvta_generic_to_shared(memory)), barriers = smem + BARRIERS_AT;
  if (threadIdx.x == 0) {
    for (int b = 0; b < 2; b++) {
      mbarrier_init(barriers + 8 * (Q_FULL + b), 1);
      mbarrier_init(barriers + 8 * (Q_EMPTY + b), 4 * CONSUMERS);
    }
    for (int b = 0; b < STAGES; b++) {
      mbarrier_init(barriers + 8 * (FULL + b), 1);
      mbarrier_init(barriers + 8 * (EMPTY + b), 4 * CONSUMERS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  WorkTile* work_tiles = reinterpret_cast<WorkTile*>(memory + WORK_TILES_AT);
  int lasts, count;
  schedule(p, lasts, count);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), group = warp >> 2;
  if (group == 0) {
    take_producer_registers();
    if (threadIdx.x == 0) produce(maps, p, smem, work_tiles);
  } else {
    take_consumer_registers();
    if (count) consume(maps, p, smem, work_tiles, group - 1, warp & 3);
  }
}
