// Skip-softmax on Hopper, persistent and warp-specialised: one producer thread and two consumer warpgroups a program.
//
// A work tile is a block of 128 queries of one head, 64 for each consumer, over all tiles of 128 keys up to its own. The
// producer brings queries' keys alone. When a tile's product is there, all threads of both consumers vote by one barrier that
// combines their votes. A tile that is kept has its values loaded then, by one of the consumers' threads: they come while the
// softmax runs and the next tile is multiplied. A tile that is skipped costs its product and its maxima.
// Macros beside those of hopper.cuh: SHARED_BYTES; V_STAGES, the depth of the pipeline of values.

#include "hopper.cuh"

constexpr int WORK_TILES = 8;  // more than the producer can be ahead of a consumer: every work tile takes at least one stage
constexpr u32 K_BYTES = K_HALF * (DIM / 64), V_BYTES = K_HALF * (V_DIM / 64);
constexpr u32 KEYS_AT = CONSUMERS * SLOT_BYTES, VALUES_AT = KEYS_AT + STAGES * K_BYTES, BARRIERS_AT = VALUES_AT + V_STAGES * V_BYTES;
constexpr u32 Q_FULL = 0, WORK_TILE_FULL = Q_FULL + CONSUMERS, K_FULL = WORK_TILE_FULL + WORK_TILES, V_FULL = K_FULL + STAGES,
              EMPTY = V_FULL + V_STAGES, BARRIERS = EMPTY + STAGES;
constexpr u32 SHARED_AT = BARRIERS_AT + (BARRIERS * 8 + 15) / 16 * 16;
constexpr int ALL = 1 << 30;

static_assert(CONSUMERS == 2 && KEYS == CONSUMERS * WARPGROUP_ROWS, "a tile has as many queries as keys");
static_assert(STAGES < WORK_TILES, "a work tile could be overwritten before all consumers have read it");

struct Maps { TensorMap q, k, v, out_first, out; };  // out_first: the queries of the first warpgroup's rows, no others
struct Plan {
  int* next;   // the next work tile, for all programs
  float* lse;  // [batch, heads, queries], where LSE is 1
  int length, first_query, first_block, blocks, ascending, heads, groups, work_tiles;  // ``blocks`` of queries
  float least, scale_log2;  // ``least``: how far below the maximum a tile is kept, before the scale
};

struct alignas(16) WorkTile { int more, block, head, batch; };

// The query heads of a key head next to each other, of each the last blocks, which take longest, first.
__device__ __forceinline__ WorkTile work_tile_at(const Plan& p, int i) {
  const int both = i / (p.groups * p.blocks), rest = i % (p.groups * p.blocks), kv_heads = p.heads / p.groups;
  WorkTile work;
  work.more = i < p.work_tiles;
  work.block = p.first_block + p.blocks - 1 - rest / p.groups;
  work.head = both % kv_heads * p.groups + rest % p.groups;
  work.batch = both / kv_heads;
  return work;
}

template <int DIMS> __device__ __forceinline__ void fetch(const TensorMap* map, u32 to, u32 full, int first, int head, int batch) {
  mbarrier_expect(full, K_HALF * (DIMS / 64));
#pragma unroll
  for (int h = 0; h < DIMS / 64; h++) load_4d(to + h * K_HALF, map, full, h * 64, first, head, batch);
}

// Whether any of the consumers' threads says so. All of them wait for each other. The shuffle tells the compiler that the answer
// is the same for all lanes: where it were not, every product would have to wait for the one before.
__device__ __forceinline__ bool any_consumer(bool says) {
  u32 y;
  asm volatile("{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nbarrier.cta.red.or.aligned.pred q, 4, 256, p;\nselp.u32 %0, 1, 0, q;\n}"
               : "=r"(y) : "r"(u32(says)) : "memory");
  return __shfl_sync(~0u, y, 0);
}

__device__ void produce(const Maps& maps, const Plan& p, u32 smem, WorkTile* work_tiles) {
  const u32 barriers = smem + BARRIERS_AT;
  PipelineState pipe = {0};
  for (u32 n = 0;; n++) {
    const WorkTile work = work_tile_at(p, atomicAdd(p.next, 1));
    work_tiles[n % WORK_TILES] = work;
    mbarrier_arrive(barriers + 8 * (WORK_TILE_FULL + n % WORK_TILES));
    if (!work.more) return;
    for (int t = 0; t <= work.block; t++) {
      const u32 at = pipe.index();
      mbarrier_wait(barriers + 8 * (EMPTY + at), pipe.phase() ^ 1);
      pipe.count++;
      fetch<DIM>(&maps.k, smem + KEYS_AT + at * K_BYTES, barriers + 8 * (K_FULL + at), (p.ascending ? t : work.block - t) * KEYS,
                 work.head / p.groups, work.batch);
    }
  }
}

__device__ void consume(const Maps& maps, const Plan& p, u32 smem, const WorkTile* work_tiles, int warpgroup, int warp) {
  const u32 barriers = smem + BARRIERS_AT, slot = smem + warpgroup * SLOT_BYTES, q_full = barriers + 8 * (Q_FULL + warpgroup);
  const int lane = threadIdx.x & 31, first_row = p.first_query / WARPGROUP_ROWS;
  float s[KEYS / 2], o[V_DIM / 2], acc_scale[2], row_max[2], running[2];
  u32 probabilities[KEYS / 4];
  SoftmaxState r;
  PipelineState pipe = {0};
  u32 kept = 0;  // tiles that were kept, of all work tiles

  const auto keys_at = [&](u32 at) { return smem + KEYS_AT + at * K_BYTES; };
  const auto values_at = [&](u32 number) { return smem + VALUES_AT + number % V_STAGES * V_BYTES; };
  const auto wait_values = [&](u32 number) { mbarrier_wait(barriers + 8 * (V_FULL + number % V_STAGES), number / V_STAGES & 1); };
  const auto release_keys = [&](u32 at) {
    if (lane == 0) mbarrier_arrive(barriers + 8 * (EMPTY + at));
  };
  const auto rescale = [&]() {
#pragma unroll
    for (int e = 0; e < V_DIM / 2; e++) o[e] *= acc_scale[(e >> 1) & 1];
  };

  for (u32 n = 0;; n++) {
    mbarrier_wait(barriers + 8 * (WORK_TILE_FULL + n % WORK_TILES), n / WORK_TILES & 1);
    const WorkTile work = work_tiles[n % WORK_TILES];
    if (!work.more) return;
    const int start = work.block * KEYS + warpgroup * WARPGROUP_ROWS;
    // A chunk may begin within a warpgroup's rows or behind them. These are then worked on from the chunk's first query on, and
    // what lies behind them is not written.
    const int query = max(start - p.first_query, 0), end = min(start + WARPGROUP_ROWS, p.length);
    if (warp == 0 && lane == 0) {
      mbarrier_expect(q_full, Q_BYTES);
#pragma unroll
      for (int h = 0; h < DIM / 64; h++) load_4d(slot + h * Q_HALF, &maps.q, q_full, h * 64, query, work.head, work.batch);
    }
    r.position[0] = p.first_query + query + warp * 16 + (lane >> 2);
    r.position[1] = r.position[0] + 8;
#pragma unroll
    for (int x = 0; x < 2; x++) {
      r.row_max[x] = NEG_INFINITY, r.shift[x] = r.row_sum[x][0] = r.row_sum[x][1] = 0.0f;
      // Rows that are not of this tile do not vote: nothing lies above their maximum.
      running[x] = r.position[x] < end ? NEG_INFINITY : -NEG_INFINITY;
    }
#pragma unroll
    for (int e = 0; e < V_DIM / 2; e++) o[e] = 0.0f;
    mbarrier_wait(q_full, n & 1);

    // Mask the tile, and vote on it. If it is kept its values are loaded: into the stage of the tile before the last, which both
    // consumers have multiplied with before they voted.
    const auto keeps = [&](int t) {
      const int first = (p.ascending ? t : work.block - t) * KEYS;
      if (first == work.block * KEYS) mask_tile(s, r, first, 0, p.length, ALL, 0, 0, p.first_query + query);
      thread_maxima(s, row_max);
      const bool keep = any_consumer((row_max[0] >= running[0] + p.least) | (row_max[1] >= running[1] + p.least));
      if (keep) {
        if (warpgroup == 0 && warp == 0 && lane == 0)
          fetch<V_DIM>(&maps.v, values_at(kept), barriers + 8 * (V_FULL + kept % V_STAGES), first, work.head / p.groups, work.batch);
        kept++;
        // Each of a row's four threads compares its own keys; they exchange maxima only where one grew.
        if (__any_sync(~0u, (row_max[0] > running[0]) | (row_max[1] > running[1]))) {
#pragma unroll
          for (int row = 0; row < 2; row++) {
#pragma unroll
            for (int x = 1; x <= 2; x++) row_max[row] = fmaxf(row_max[row], __shfl_xor_sync(~0u, row_max[row], x));
            running[row] = fmaxf(running[row], row_max[row]);
          }
        }
      }
      return keep;
    };

    bool holds = false;  // whether ``probabilities`` are those of the last tile that was kept
    for (int t = 0; t <= work.block; t++) {
      const u32 at = pipe.index();
      mbarrier_wait(barriers + 8 * (K_FULL + at), pipe.phase());
      pipe.count++;
      if (holds) {
        // QK of the next tile and PV of this one run together, and the softmax of the former overlaps with the latter.
        const u32 held = kept - 1;
        wgmma_fence();
        gemm_qk(s, slot, keys_at(at));
        wgmma_commit();
        wait_values(held);
        gemm_pv(o, probabilities, values_at(held), 1);
        wgmma_commit();
        wgmma_wait<1>();
        fence_operand(s);
        release_keys(at);
        holds = keeps(t);
        const bool grows = holds && softmax(s, r, p.scale_log2, acc_scale, row_max);
        // A loop on a barrier, which the assembler moves no arithmetic across: the softmax overlaps with PV.
        wait_values(held);
        wgmma_wait<0>();
        fence_operand(o);
        if (grows) rescale();
      } else {
        wgmma_fence();
        gemm_qk(s, slot, keys_at(at));
        wgmma_commit();
        wgmma_wait<0>();
        fence_operand(s);
        release_keys(at);
        holds = keeps(t);
        if (holds && softmax(s, r, p.scale_log2, acc_scale, row_max)) rescale();
      }
      if (holds) to_operand(s, probabilities);
    }
    if (holds) {
      wait_values(kept - 1);
      wgmma_fence();
      gemm_pv(o, probabilities, values_at(kept - 1), 1);
      wgmma_commit();
      wgmma_wait<0>();
      fence_operand(o);
    }

    float row_sum[2] = {r.row_sum[0][0] + r.row_sum[0][1], r.row_sum[1][0] + r.row_sum[1][1]}, factor[2];
    output_scale(row_sum, factor);
#if LSE
    if ((lane & 3) == 0) {
#pragma unroll
      for (int x = 0; x < 2; x++)
        if (r.position[x] < end)
          p.lse[(u64(work.batch) * p.heads + work.head) * (p.length - p.first_query) + r.position[x] - p.first_query] =
              log_sum_exp(r.row_max[x], row_sum[x]);
    }
#endif
    stage_output(o, factor, warpgroup, warp, slot);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    const int row = start / WARPGROUP_ROWS;
    if (lane == 0 && row >= first_row) {
      const TensorMap* out = row == first_row ? &maps.out_first : &maps.out;
#pragma unroll
      for (int h = 0; h < V_DIM / 64; h++)
        store_4d(out, slot + warp * 2048 + h * Q_HALF, h * 64, query + warp * 16, work.head, work.batch);
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    }
    // The next queries take the place of all four warps' outputs.
    asm volatile("bar.sync %0, 128;" ::"r"(1 + warpgroup) : "memory");
  }
}

static_assert(SHARED_AT + WORK_TILES * sizeof(WorkTile) <= SHARED_BYTES, "shared memory");

extern "C" __global__ void __launch_bounds__(128 + 128 * CONSUMERS, 1)
    skip_softmax(const __grid_constant__ Maps maps, const __grid_constant__ Plan p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const u32 smem = u32(__cvta_generic_to_shared(memory)), barriers = smem + BARRIERS_AT;
  if (threadIdx.x == 0) {
    for (u32 b = 0; b < EMPTY; b++) mbarrier_init(barriers + 8 * b, 1);
    for (u32 b = EMPTY; b < BARRIERS; b++) mbarrier_init(barriers + 8 * b, 4 * CONSUMERS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  WorkTile* work_tiles = reinterpret_cast<WorkTile*>(memory + SHARED_AT);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), group = warp >> 2;
  if (group == 0) {
    take_producer_registers();
    if (threadIdx.x == 0) produce(maps, p, smem, work_tiles);
  } else {
    take_consumer_registers();
    consume(maps, p, smem, work_tiles, group - 1, warp & 3);
  }
}
