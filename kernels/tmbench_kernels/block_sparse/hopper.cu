// Attention over listed keys on Hopper, persistent and warp-specialised: one producer warp and two or three consumer
// warpgroups a program. It serves vertical-slash patterns, whose lists hold pieces of 64 keys that start anywhere, patterns of whole
// key blocks, and, where SPREAD is 1, dense rows that lie apart.
//
// A work tile is neighbouring blocks of 64 queries of one head, one for each consumer. Their lists differ, but where runs of
// keys are long most pieces are shared: the producer merges the lists, loads each tile of 64 keys once, and says with
// it which consumers take it; the others skip it. Gathered columns are the same for all blocks of a head, of which each counts
// its own. Work tiles of the query heads that share a key head run at the same time, so that keys come from the cache.
//
// Rows that lie apart see all keys up to their own, so nothing is listed. Blocks are 64 such rows, each far longer than a tile of
// keys. A work tile takes blocks of the query heads that share a key head, since these end at the same key, and a piece of
// their keys. Which pieces there are, and in which order, the host says. Each leaves an output in float32 and a log-sum-exp.
//
// Macros beside those of hopper.cuh: SHARED_BYTES, SPREAD. A stage holds a tile of keys and one of values. Where heads are so wide that
// there are few stages, keys leave theirs as soon as they are multiplied, and the values that they came with stay.

#include "hopper.cuh"

constexpr int WORK_TILES = 8;  // more than the producer can be ahead of a consumer: every work tile takes at least one stage
constexpr u32 TILES_AT = CONSUMERS * SLOT_BYTES;
constexpr u32 PAIR_BYTES = K_HALF * ((DIM + V_DIM) / 64), VALUES = K_HALF * (DIM / 64);
constexpr u32 BARRIERS_AT = TILES_AT + STAGES * PAIR_BYTES;
constexpr bool APART = DIM > 128 || V_DIM > 128;  // whether keys leave a stage before its values
constexpr u32 Q_FULL = 0, WORK_TILE_FULL = Q_FULL + CONSUMERS, K_FULL = WORK_TILE_FULL + WORK_TILES, V_FULL = K_FULL + STAGES, EMPTY = V_FULL + STAGES,
              V_EMPTY = APART ? EMPTY + STAGES : EMPTY, BARRIERS = V_EMPTY + STAGES;
constexpr u32 SHARED_AT = BARRIERS_AT + (BARRIERS * 8 + 15) / 16 * 16;
constexpr int NEVER = 0x7fffffff, ALL = 1 << 30;

static_assert(STAGES < WORK_TILES, "a work tile could be overwritten before all consumers have read it");

#if SPREAD
struct Maps { TensorMap q, k, v; };  // q: the rows alone
struct Plan {
  const int4* pieces;  // [pieces], of every key head: the last unit, the first key, the end, and which split it is
  int* next;           // the next work tile, for all programs
  float* split_out;    // [splits, batch, rows, heads, v_dim]
  float* split_lse;    // [splits, batch, rows, heads], to base 2; -inf beforehand, and where a row has no key in a split
  int length, first_query, first, delta, rows, heads, groups, batches, v_dim, work_tiles;
  float scale_log2;
};
#else
struct Maps { TensorMap q, k, v, k_columns, v_columns, out_first, out; };  // out_first: the queries of the first row, no others
struct Plan {
  const int* entries;         // [batch, heads, lists, most], ascending: where ``fold`` pieces start, in ``unit`` keys
  const int* counts;          // [batch, heads, lists]
  const unsigned char* kept;  // [batch, heads, rows, width], width a multiple of 64
  const int* before;          // [batch, heads, rows], or null where there are no columns
  const int* reach;           // [heads], or null where queries see all of their pieces
  const int* sinks;           // [heads]
  int* next;                  // the next work tile, for all programs
  int length, first_query, first_row, rows, fold, unit, most, width, heads, groups, work_tiles;  // ``fold`` rows share a list
  float scale_log2;
  float* lse;  // [batch, heads, queries], where LSE is 1
};
#endif

enum Kind { PIECE, COLUMNS, END };
struct alignas(16) Tile {
  int kind, first, consumers, spare;  // the first key of a piece, or which tile of columns; the consumers that take it, as bits
  u64 counted[CONSUMERS + CONSUMERS % 2];  // which columns of a tile count for a warpgroup
};
#if SPREAD
struct alignas(16) WorkTile { int more, unit, kv_head, batch, low, high, split; };
#else
struct alignas(16) WorkTile { int more, row, head, batch, reach, sinks; };
#endif
struct Shared {
  WorkTile work_tiles[WORK_TILES];
  Tile tiles[STAGES];
};


template <int DIMS> __device__ __forceinline__ void fetch(const TensorMap* map, u32 to, u32 full, int first, int head, int batch) {
  mbarrier_expect(full, K_HALF * (DIMS / 64));
#pragma unroll
  for (int h = 0; h < DIMS / 64; h++) load_4d(to + h * K_HALF, map, full, h * 64, first, head, batch);
}

#if SPREAD
// The first query of a chunk stands for a row that is gone.
__device__ __forceinline__ int position_of(const Plan& p, int row) { return max(p.first + row * p.delta, p.first_query); }

// Units are blocks of rows by query heads of one key head: the heads of the first block come first. A consumer has the unit
// before that of the consumer before it.
__device__ __forceinline__ WorkTile work_tile_at(const Plan& p, int i) {
  const int all_heads = p.batches * (p.heads / p.groups), kv_heads = p.heads / p.groups, head = i % all_heads;
  WorkTile work;
  work.more = i < p.work_tiles;
  const int4 piece = work.more ? p.pieces[i / all_heads] : make_int4(0, 0, 0, 0);
  work.unit = piece.x, work.low = piece.y, work.high = piece.z, work.split = piece.w;
  work.kv_head = head % kv_heads;
  work.batch = head / kv_heads;
  return work;
}
#else
constexpr int LAST_TILES = 2;  // of every head, which are worked on first

// A prompt's last rows may see all keys, and so take much longer than others: all heads begin with them, so that none is left to
// run alone at the end. Then the query heads of a key head lie next to each other, of each the last blocks, which see most, first.
__device__ __forceinline__ WorkTile work_tile_at(const Plan& p, int i) {
  const int tiles = (p.rows + CONSUMERS - 1) / CONSUMERS, last = min(LAST_TILES, tiles), others = max(tiles - last, 1);
  const int all_heads = p.work_tiles / tiles, j = i - last * all_heads;
  // How many heads of the batch come before this one, and how many of its tiles after this one.
  int before = i % all_heads, after = i / all_heads;
  if (j >= 0) {
    before = j / (p.groups * others) * p.groups + j % p.groups;
    after = last + j % (p.groups * others) / p.groups;
  }
  WorkTile work;
  work.more = i < p.work_tiles;
  work.row = (tiles - 1 - after) * CONSUMERS;
  work.head = before % p.heads;
  work.batch = before / p.heads;
  work.reach = work.more && p.reach ? p.reach[work.head] : ALL;
  work.sinks = work.more && p.reach ? p.sinks[work.head] : 0;
  return work;
}
#endif

__device__ void produce(const Maps& maps, const Plan& p, u32 smem, Shared& shared) {
  const u32 barriers = smem + BARRIERS_AT;
  const int lane = threadIdx.x & 31;
  PipelineState pipe = {0};
  // All lanes wait for the stage, since several write to its tile.
  const auto open = [&]() -> Tile& {
    mbarrier_wait(barriers + 8 * (EMPTY + pipe.index()), pipe.phase() ^ 1);
    return shared.tiles[pipe.index()];
  };
  const auto send = [&](const TensorMap& k, const TensorMap& v, int first, int head, int batch) {
    const u32 at = pipe.index(), to = smem + TILES_AT + at * PAIR_BYTES;
    __syncwarp();
    if (lane == 0) fetch<DIM>(&k, to, barriers + 8 * (K_FULL + at), first, head, batch);
    if (APART) mbarrier_wait(barriers + 8 * (V_EMPTY + at), pipe.phase() ^ 1);
    if (lane == 0) fetch<V_DIM>(&v, to + VALUES, barriers + 8 * (V_FULL + at), first, head, batch);
    pipe.count++;
  };
  for (u32 n = 0;; n++) {
    int i = 0;
    if (lane == 0) i = atomicAdd(p.next, 1);
    const WorkTile work = work_tile_at(p, __shfl_sync(~0u, i, 0));
    if (lane == 0) {
      shared.work_tiles[n % WORK_TILES] = work;
      mbarrier_arrive(barriers + 8 * (WORK_TILE_FULL + n % WORK_TILES));
    }
    if (!work.more) return;
#if SPREAD
    const int unit = work.unit - lane;
    const bool works = lane < CONSUMERS && unit >= 0;
    const int end = works ? position_of(p, min((unit / p.groups + 1) * WARPGROUP_ROWS, p.rows) - 1) + 1 : 0;
    for (int first = work.low; first < work.high; first += KEYS) {
      const u32 consumers = __ballot_sync(~0u, first < end);
      Tile& tile = open();
      if (lane == 0) tile.kind = PIECE, tile.first = first, tile.consumers = consumers;
      send(maps.k, maps.v, first, work.kv_head, work.batch);
    }
#else
    const int kv_head = work.head / p.groups;

    // Each of the first lanes walks its consumer's list; the smallest start of all is the next tile.
    const int row = work.row + lane, own_end = (p.first_row + row + 1) * WARPGROUP_ROWS, first_list = p.first_row / p.fold;
    const int lists = (p.first_row + p.rows + p.fold - 1) / p.fold - first_list;
    const u64 list = u64(work.batch * p.heads + work.head) * lists + (p.first_row + row) / p.fold - first_list;
    const int* entry = p.entries + list * p.most;
    const int* end = entry + (lane < CONSUMERS && row < p.rows ? p.counts[list] : 0);
    int start = entry < end ? *entry * p.unit : NEVER, ahead = entry + 1 < end ? entry[1] * p.unit : NEVER, piece = 0;
    while (true) {
      // Of a block that several rows share, the first ones do not reach the last pieces.
      if (start >= own_end) start = NEVER;
      int first = start;
#pragma unroll
      for (int x = 1; x < CONSUMERS; x *= 2) first = min(first, __shfl_xor_sync(~0u, first, x));
      first = __shfl_sync(~0u, first, 0);
      if (first == NEVER) break;
      const bool mine = start == first;
      const u32 consumers = __ballot_sync(~0u, mine);
      if (mine) {
        start += KEYS;
        if (++piece == p.fold) {
          entry++;
          piece = 0;
          start = ahead;
          ahead = entry + 1 < end ? entry[1] * p.unit : NEVER;
        }
      }
      Tile& tile = open();
      if (lane == 0) tile.kind = PIECE, tile.first = first, tile.consumers = consumers;
      send(maps.k, maps.v, first, kv_head, work.batch);
    }

    // Eight lanes for each consumer: every one turns 8 bytes of 0 or 1 into bits.
    const int warpgroup = lane >> 3;
    const bool reads = p.before && warpgroup < CONSUMERS && work.row + warpgroup < p.rows;
    const u64 place = u64(work.batch * p.heads + work.head) * p.rows + work.row + warpgroup;
    const u64* kept = reinterpret_cast<const u64*>(p.kept + place * p.width) + (lane & 7);
    const int own = reads ? (p.before[place] + KEYS - 1) / KEYS : 0;
    int most = own;
#pragma unroll
    for (int x = 8; x < 32; x *= 2) most = max(most, __shfl_xor_sync(~0u, most, x));
    u64 word = own > 0 ? kept[0] : 0;
    for (int t = 0; t < most; t++) {
      u64 counted = (word * 0x0102040810204080ull >> 56) << (8 * (lane & 7));
      word = t + 1 < own ? kept[(t + 1) * (KEYS / 8)] : 0;
#pragma unroll
      for (int x = 1; x < 8; x *= 2) counted |= __shfl_xor_sync(~0u, counted, x);
      const u32 some = __ballot_sync(~0u, counted != 0 && (lane & 7) == 0);
      if (!some) continue;
      Tile& tile = open();
      if ((lane & 7) == 0 && warpgroup < CONSUMERS) tile.counted[warpgroup] = counted;
      if (lane == 0) tile.kind = COLUMNS, tile.first = t, tile.consumers = (some & 1) | (some >> 7 & 2) | (some >> 14 & 4);
      send(maps.k_columns, maps.v_columns, t * KEYS, work.head, work.batch);
    }
#endif

    Tile& tile = open();
    if (APART) mbarrier_wait(barriers + 8 * (V_EMPTY + pipe.index()), pipe.phase() ^ 1);
    if (lane == 0) {
      tile.kind = END;
      // Both, so that their phases stay those of the pipeline.
      mbarrier_arrive(barriers + 8 * (K_FULL + pipe.index()));
      mbarrier_arrive(barriers + 8 * (V_FULL + pipe.index()));
    }
    pipe.count++;
  }
}

__device__ void consume(const Maps& maps, const Plan& p, u32 smem, const Shared& shared, int warpgroup, int warp) {
  const u32 barriers = smem + BARRIERS_AT, slot = smem + warpgroup * SLOT_BYTES, q_full = barriers + 8 * (Q_FULL + warpgroup);
  const int lane = threadIdx.x & 31;
  float s[KEYS / 2], o[V_DIM / 2], acc_scale[2];
  u32 probabilities[KEYS / 4];
  SoftmaxState r;
  PipelineState pipe = {0};
  int start, kind, first;
#if !SPREAD
  int query, free_from, reach, sinks;
  u64 counted;
#endif

  // A stage, all of it; or where they leave apart its keys, and later its values.
  const auto release = [&](u32 at) {
    if (lane == 0) mbarrier_arrive(barriers + 8 * (EMPTY + at));
    if (APART && lane == 0) mbarrier_arrive(barriers + 8 * (V_EMPTY + at));
  };
  const auto release_keys = [&](u32 at) {
    if (APART && lane == 0) mbarrier_arrive(barriers + 8 * (EMPTY + at));
  };
  const auto release_values = [&](u32 at) {
    if (lane == 0) mbarrier_arrive(barriers + 8 * (V_EMPTY + at));
  };
  const auto keys_at = [&](u32 at) { return smem + TILES_AT + at * PAIR_BYTES; };
  // Skip the tiles of other consumers, at most ``limit`` tiles in all: whether the last one looked at is this one's, or an end.
  const auto find = [&](int limit) {
    for (int looked = 0; looked < limit; looked++) {
      const u32 at = pipe.index(), phase = pipe.phase();
      mbarrier_wait(barriers + 8 * (K_FULL + at), phase);
      pipe.count++;
      const Tile& tile = shared.tiles[at];
      kind = tile.kind, first = tile.first;
      const bool mine = kind == END || (tile.consumers >> warpgroup & 1);
      if (mine) {
#if !SPREAD
        if (kind == COLUMNS) counted = tile.counted[warpgroup];
#endif
        return true;
      }
      // Keys can come while another consumer still needs the values that were there before: only the tile's own values say that
      // all have released those, and that a release now counts for this tile.
      if (APART) mbarrier_wait(barriers + 8 * (V_FULL + at), phase);
      __syncwarp();
      release(at);
    }
    return false;
  };
  const auto mask = [&]() {
#if SPREAD
    if (first + KEYS - 1 > start) mask_tile(s, r, first, 0, p.length, ALL, 0, 0, start);
#else
    if (kind == COLUMNS) {
      // Columns lie before the last run, and so before all queries of the block.
      const u64 bits = counted >> (2 * (threadIdx.x & 3));
#pragma unroll
      for (int e = 0; e < KEYS / 2; e++) s[e] = bits >> (8 * (e >> 2) + (e & 1)) & 1 ? s[e] : NEG_INFINITY;
    } else if ((first + KEYS - 1 > start) | (first < free_from)) {
      mask_tile(s, r, first, 0, p.length, reach, sinks, free_from, start);
    }
#endif
  };
  const auto rescale = [&]() {
#pragma unroll
    for (int e = 0; e < V_DIM / 2; e++) o[e] *= acc_scale[(e >> 1) & 1];
  };

  for (u32 n = 0;; n++) {
    mbarrier_wait(barriers + 8 * (WORK_TILE_FULL + n % WORK_TILES), n / WORK_TILES & 1);
    const WorkTile work = shared.work_tiles[n % WORK_TILES];
    if (!work.more) return;
#if SPREAD
    // One without a unit is sent no tile, and so writes nothing.
    const int unit = max(work.unit - warpgroup, 0), row = unit / p.groups * WARPGROUP_ROWS;
    const int query = row, head = work.kv_head * p.groups + unit % p.groups;
    const auto own_row = [&](int x) { return row + warp * 16 + (lane >> 2) + 8 * x; };
    start = position_of(p, row);
#else
    const int head = work.head;
    start = (p.first_row + work.row + warpgroup) * WARPGROUP_ROWS;
    // A chunk may begin within its first row, and the accelerator writes nothing before a tensor: an illegal instruction. That
    // row is then worked on from the chunk's first query on, and what lies behind the row is not written.
    query = max(start - p.first_query, 0);
    reach = work.reach, sinks = work.sinks, free_from = max(start + WARPGROUP_ROWS - reach, 0);
#endif
    if (warp == 0 && lane == 0) {
      mbarrier_expect(q_full, Q_BYTES);
#pragma unroll
      for (int h = 0; h < DIM / 64; h++) load_4d(slot + h * Q_HALF, &maps.q, q_full, h * 64, query, head, work.batch);
    }
#if SPREAD
    r.position[0] = position_of(p, own_row(0));
    r.position[1] = position_of(p, own_row(1));
#else
    r.position[0] = p.first_query + query + warp * 16 + (lane >> 2);
    r.position[1] = r.position[0] + 8;
#endif
#pragma unroll
    for (int x = 0; x < 2; x++) r.row_max[x] = NEG_INFINITY, r.shift[x] = r.row_sum[x][0] = r.row_sum[x][1] = 0.0f;
#pragma unroll
    for (int e = 0; e < V_DIM / 2; e++) o[e] = 0.0f;
    mbarrier_wait(q_full, n & 1);

    bool holds = false;  // whether ``probabilities`` are those of the tile in stage ``held``
    u32 held = 0, held_phase = 0;
    while (true) {
      // While a stage is held only the others can be filled: this consumer must not wait beyond those.
      const bool found = find(holds ? STAGES - 1 : NEVER);
      const u32 at = (pipe.count - 1) % STAGES, phase = (pipe.count - 1) / STAGES & 1;
      if (holds && found && kind != END) {
        // QK of the next tile and PV of this one run together, and the softmax of the former overlaps with the latter.
        wgmma_fence();
        gemm_qk(s, slot, keys_at(at));
        wgmma_commit();
        mbarrier_wait(barriers + 8 * (V_FULL + held), held_phase);
        gemm_pv(o, probabilities, keys_at(held) + VALUES, 1);
        wgmma_commit();
        wgmma_wait<1>();
        fence_operand(s);
        release_keys(at);
        mask();
        const bool grows = softmax(s, r, p.scale_log2, acc_scale);
        // A loop on a barrier, which the assembler moves no arithmetic across: the softmax overlaps with PV.
        mbarrier_wait(barriers + 8 * (V_FULL + held), held_phase);
        wgmma_wait<0>();
        fence_operand(o);
        release_values(held);
        if (grows) rescale();
        to_operand(s, probabilities);
      } else {
        if (holds) {
          mbarrier_wait(barriers + 8 * (V_FULL + held), held_phase);
          wgmma_fence();
          gemm_pv(o, probabilities, keys_at(held) + VALUES, 1);
          wgmma_commit();
          wgmma_wait<0>();
          fence_operand(o);
          release_values(held);
          holds = false;
          if (!found) continue;
        }
        if (kind == END) {
          // A consumer without a tile comes here with nothing that has converged its lanes since they read which one it is.
          __syncwarp();
          release(at);
          break;
        }
        wgmma_fence();
        gemm_qk(s, slot, keys_at(at));
        wgmma_commit();
        wgmma_wait<0>();
        fence_operand(s);
        release_keys(at);
        mask();
        if (softmax(s, r, p.scale_log2, acc_scale)) rescale();
        to_operand(s, probabilities);
      }
      holds = true;
      held = at, held_phase = phase;
    }

    float row_sum[2] = {r.row_sum[0][0] + r.row_sum[0][1], r.row_sum[1][0] + r.row_sum[1][1]}, factor[2];
    output_scale(row_sum, factor);
#if SPREAD
#pragma unroll
    for (int x = 0; x < 2; x++) {
      if (own_row(x) < p.rows && row_sum[x] != 0.0f) {
        const u64 slot = (u64(work.split * p.batches + work.batch) * p.rows + own_row(x)) * p.heads + head;
        if ((lane & 3) == 0) p.split_lse[slot] = r.row_max[x] + __log2f(row_sum[x]);
#pragma unroll
        for (int g = 0; g < V_DIM / 8; g++)
          if (8 * g < p.v_dim)
            *reinterpret_cast<float2*>(p.split_out + slot * p.v_dim + 8 * g + 2 * (lane & 3)) =
                make_float2(o[4 * g + 2 * x] * factor[x], o[4 * g + 2 * x + 1] * factor[x]);
      }
    }
#else
#if LSE
    if ((lane & 3) == 0) {
#pragma unroll
      for (int x = 0; x < 2; x++)
        if (r.position[x] < min(start + WARPGROUP_ROWS, p.length))
          p.lse[(u64(work.batch) * p.heads + work.head) * (p.length - p.first_query) + r.position[x] - p.first_query] =
              log_sum_exp(r.row_max[x], row_sum[x]);
    }
#endif
    stage_output(o, factor, warpgroup, warp, slot);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (lane == 0) {
      const TensorMap* out = work.row + warpgroup == 0 ? &maps.out_first : &maps.out;
#pragma unroll
      for (int h = 0; h < V_DIM / 64; h++)
        store_4d(out, slot + warp * 2048 + h * Q_HALF, h * 64, query + warp * 16, work.head, work.batch);
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    }
#endif
    // The next queries take the place of all four warps' outputs.
    asm volatile("bar.sync %0, 128;" ::"r"(1 + warpgroup) : "memory");
  }
}

static_assert(SHARED_AT + sizeof(Shared) <= SHARED_BYTES, "shared memory");

extern "C" __global__ void __launch_bounds__(128 + 128 * CONSUMERS, 1)
    lists(const __grid_constant__ Maps maps, const __grid_constant__ Plan p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const u32 smem = u32(__cvta_generic_to_shared(memory)), barriers = smem + BARRIERS_AT;
  if (threadIdx.x == 0) {
    for (u32 b = 0; b < EMPTY; b++) mbarrier_init(barriers + 8 * b, 1);
    for (u32 b = EMPTY; b < BARRIERS; b++) mbarrier_init(barriers + 8 * b, 4 * CONSUMERS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  Shared& shared = *reinterpret_cast<Shared*>(memory + SHARED_AT);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), group = warp >> 2;
  if (group == 0) {
    take_producer_registers();
    if (warp == 0) produce(maps, p, smem, shared);
  } else {
    take_consumer_registers();
    consume(maps, p, smem, shared, group - 1, warp & 3);
  }
}
