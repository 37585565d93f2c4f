// Skip-softmax on Hopper, persistent and warp-specialised: a producer of keys, one of values, and two consumer warpgroups a program.
//
// A work tile is a block of 128 queries of one head, 64 for each consumer, over all tiles of 128 keys up to its own. When a
// tile's product is there, every warp of both consumers votes, by its rows alone, and goes on: the product of the next tile is
// started, into registers of its own, before the votes of the others are asked for. Nothing waits for all warps but a tile that
// this warp would skip, and that for the votes of others alone, which come while the next product runs. So the consumers may be
// tiles apart, and the softmax of one runs beside the products of the other.
//
// A warp's votes follow from its own products alone: a tile that it would skip raises no maximum of its rows, whatever others say.
// The first warp that keeps a tile asks for its values. A tile that is skipped costs its product and its maxima.
// Macros beside those of hopper.cuh: SHARED_BYTES; V_STAGES, the depth of the pipeline of values.

#include "hopper.cuh"

constexpr int WORK_TILES = 8;  // more than the producer can be ahead of a consumer: every work tile takes at least one stage
constexpr u32 VOTES = 8;       // tiles whose votes are known: more than one warp can be ahead of another
constexpr u32 K_BYTES = K_HALF * (DIM / 64), V_BYTES = K_HALF * (V_DIM / 64);
constexpr u32 KEYS_AT = CONSUMERS * SLOT_BYTES, VALUES_AT = KEYS_AT + STAGES * K_BYTES, BARRIERS_AT = VALUES_AT + V_STAGES * V_BYTES;
constexpr u32 Q_FULL = 0, WORK_TILE_FULL = Q_FULL + CONSUMERS, K_FULL = WORK_TILE_FULL + WORK_TILES, V_FULL = K_FULL + STAGES,
              REQUESTED = V_FULL + V_STAGES, EMPTY = REQUESTED + V_STAGES, V_EMPTY = EMPTY + STAGES, VOTED = V_EMPTY + V_STAGES,
              BARRIERS = VOTED + VOTES;
constexpr u32 SHARED_AT = BARRIERS_AT + (BARRIERS * 8 + 15) / 16 * 16;
constexpr int ALL = 1 << 30;

static_assert(CONSUMERS == 2 && KEYS == CONSUMERS * WARPGROUP_ROWS, "a tile has as many queries as keys");
static_assert(STAGES < WORK_TILES, "a work tile could be overwritten before all consumers have read it");
// A warp votes on a tile when its keys are there, so all have released, and voted on, those STAGES tiles before.
static_assert(STAGES < VOTES, "votes could be overwritten before all warps have read them");

struct Maps { TensorMap q, k, v, out_first, out; };  // out_first: the queries of the first warpgroup's rows, no others
struct Plan {
  int* next;   // the next work tile, for all programs
  float* lse;  // [batch, heads, queries], where LSE is 1
  int length, first_query, first_block, blocks, ascending, heads, groups, work_tiles;  // ``blocks`` of queries
  float least, scale_log2;  // ``least``: how far below the maximum a tile is kept, before the scale
};

struct alignas(16) WorkTile { int more, block, head, batch; };
struct alignas(16) Request { int more, first, kv_head, batch; };  // of a tile's values
struct Shared {
  WorkTile work_tiles[WORK_TILES];
  Request requests[V_STAGES];
  u32 kept[VOTES];  // a tile's number, counted from 1 over all work tiles, where a warp has kept it
  u32 requests_made;
};

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

// Whether a warp has kept a tile, or none has and all have voted.
__device__ __forceinline__ bool any_keeps(u32 kept, u32 number, u32 voted, u32 phase) {
  u32 y;
  asm volatile(
      "{\n.reg .pred keep, done;\n.reg .u32 seen;\n"
      "POLL:\nld.acquire.cta.shared::cta.u32 seen, [%1];\nsetp.eq.u32 keep, seen, %2;\n@keep bra KNOWN;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%3], %4;\n@!done bra POLL;\n"
      "ld.acquire.cta.shared::cta.u32 seen, [%1];\nsetp.eq.u32 keep, seen, %2;\n"
      "KNOWN:\nselp.u32 %0, 1, 0, keep;\n}"
      : "=r"(y) : "r"(kept), "r"(number), "r"(voted), "r"(phase) : "memory");
  // The shuffle tells the compiler that the answer is the same for all lanes: where it were not, every product would have to wait
  // for the one before.
  return __shfl_sync(~0u, y, 0);
}
__device__ __forceinline__ void store_release(u32 to, u32 x) {
  asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(to), "r"(x) : "memory");
}

__device__ void produce_keys(const Maps& maps, const Plan& p, u32 smem, Shared& shared) {
  const u32 barriers = smem + BARRIERS_AT;
  PipelineState pipe = {0};
  for (u32 n = 0;; n++) {
    const WorkTile work = work_tile_at(p, atomicAdd(p.next, 1));
    shared.work_tiles[n % WORK_TILES] = work;
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

__device__ void produce_values(const Maps& maps, u32 smem, const Shared& shared) {
  const u32 barriers = smem + BARRIERS_AT;
  for (u32 number = 0;; number++) {
    const u32 at = number % V_STAGES, phase = number / V_STAGES & 1;
    mbarrier_wait(barriers + 8 * (REQUESTED + at), phase);
    const Request request = shared.requests[at];
    if (!request.more) return;
    mbarrier_wait(barriers + 8 * (V_EMPTY + at), phase ^ 1);
    fetch<V_DIM>(&maps.v, smem + VALUES_AT + at * V_BYTES, barriers + 8 * (V_FULL + at), request.first, request.kv_head, request.batch);
  }
}

__device__ void consume(const Maps& maps, const Plan& p, u32 smem, Shared& shared, int warpgroup, int warp) {
  const u32 barriers = smem + BARRIERS_AT, slot = smem + warpgroup * SLOT_BYTES, q_full = barriers + 8 * (Q_FULL + warpgroup);
  const u32 kept_at = u32(__cvta_generic_to_shared(shared.kept));
  const int lane = threadIdx.x & 31, first_row = p.first_query / WARPGROUP_ROWS;
  // ``row_max``: of the tile voted on last. ``running``: of all tiles voted on.
  float even[KEYS / 2], odd[KEYS / 2], o[V_DIM / 2], acc_scale[2], row_max[2], running[2];
  SoftmaxState r;
  PipelineState pipe = {0};
  u32 kept = 0;  // tiles that were kept and multiplied with their values, of all work tiles

  const auto keys_at = [&](u32 at) { return smem + KEYS_AT + at * K_BYTES; };
  const auto release_keys = [&](u32 at) {
    if (lane == 0) mbarrier_arrive(barriers + 8 * (EMPTY + at));
  };
  // The values of the ``number``-th tile that is kept are asked for by whoever comes first.
  const auto request = [&](u32 number, const Request& values) {
    if (atomicCAS(&shared.requests_made, number, number + 1) != number) return;
    // The values before have come, or nobody would be here: the request before was read.
    shared.requests[number % V_STAGES] = values;
    mbarrier_arrive(barriers + 8 * (REQUESTED + number % V_STAGES));
  };

  for (u32 n = 0;; n++) {
    mbarrier_wait(barriers + 8 * (WORK_TILE_FULL + n % WORK_TILES), n / WORK_TILES & 1);
    const WorkTile work = shared.work_tiles[n % WORK_TILES];
    if (!work.more) break;
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

    // Start the product with the next tile's keys. Returns their stage.
    const auto multiply_keys = [&](float (&s)[KEYS / 2]) {
      const u32 at = pipe.index();
      mbarrier_wait(barriers + 8 * (K_FULL + at), pipe.phase());
      pipe.count++;
      wgmma_fence();
      gemm_qk(s, slot, keys_at(at));
      wgmma_commit();
      return at;
    };
    // Mask tile t and vote on it: whether this warp keeps it.
    const auto vote = [&](float (&s)[KEYS / 2], int t) {
      const int first = (p.ascending ? t : work.block - t) * KEYS;
      if (first == work.block * KEYS) mask_tile(s, r, first, 0, p.length, ALL, 0, 0, p.first_query + query);
      thread_maxima(s, row_max);
      const bool keep = __any_sync(~0u, (row_max[0] >= running[0] + p.least) | (row_max[1] >= running[1] + p.least));
      if (lane == 0) {
        const u32 at = (pipe.count - 1) % VOTES;
        if (keep) {
          request(kept, {1, first, work.head / p.groups, work.batch});
          store_release(kept_at + 4 * at, pipe.count);
        }
        mbarrier_arrive(barriers + 8 * (VOTED + at));
      }
      // Each of a row's four threads compares its own keys; they exchange maxima only where one grew.
      if (__any_sync(~0u, (row_max[0] > running[0]) | (row_max[1] > running[1]))) {
#pragma unroll
        for (int row = 0; row < 2; row++) {
#pragma unroll
          for (int x = 1; x <= 2; x++) row_max[row] = fmaxf(row_max[row], __shfl_xor_sync(~0u, row_max[row], x));
          running[row] = fmaxf(running[row], row_max[row]);
        }
      }
      return keep;
    };
    // Whether the tile of this number is kept, as this warp would or another one.
    const auto is_kept = [&](bool keep, u32 number) {
      if (keep) return true;
      const u32 at = number % VOTES;
      return any_keeps(kept_at + 4 * at, number + 1, barriers + 8 * (VOTED + at), number / VOTES & 1);
    };
    // Softmax of a tile that is kept; start its product with its values.
    const auto multiply_values = [&](float (&s)[KEYS / 2]) {
      u32 probabilities[KEYS / 4];
      if (softmax(s, r, p.scale_log2, acc_scale, row_max)) {
#pragma unroll
        for (int e = 0; e < V_DIM / 2; e++) o[e] *= acc_scale[(e >> 1) & 1];
      }
      // Sums that the compiler left for later would hold the registers of ``s``, for which there is no room.
      fence_operand(r.row_sum[0]);
      fence_operand(r.row_sum[1]);
      to_operand(s, probabilities);
      const u32 at = kept % V_STAGES;
      mbarrier_wait(barriers + 8 * (V_FULL + at), kept / V_STAGES & 1);
      wgmma_fence();
      gemm_pv(o, probabilities, smem + VALUES_AT + at * V_BYTES, 1);
      wgmma_commit();
      kept++;
    };
    const auto finish_values = [&]() {
      wgmma_wait<0>();
      fence_operand(o);
      if (lane == 0) mbarrier_arrive(barriers + 8 * (V_EMPTY + (kept - 1) % V_STAGES));
    };
    // From the vote on tile t to the vote on the next one: QK of that one runs beside the softmax, and its vote beside PV.
    const auto step = [&](float (&s)[KEYS / 2], float (&next)[KEYS / 2], int t, bool keep) {
      const u32 number = pipe.count - 1, at = multiply_keys(next);
      if (is_kept(keep, number)) {
        multiply_values(s);
        wgmma_wait<1>();
        fence_operand(next);
        release_keys(at);
        keep = vote(next, t + 1);
        finish_values();
      } else {
        wgmma_wait<0>();
        fence_operand(next);
        release_keys(at);
        keep = vote(next, t + 1);
      }
      return keep;
    };

    const u32 at = multiply_keys(even);
    wgmma_wait<0>();
    fence_operand(even);
    release_keys(at);
    bool keep = vote(even, 0);
    for (int t = 0; t < work.block; t += 2) {
      keep = step(even, odd, t, keep);
      if (t + 1 == work.block) {
#pragma unroll
        for (int e = 0; e < KEYS / 2; e++) even[e] = odd[e];
        break;
      }
      keep = step(odd, even, t + 1, keep);
    }
    if (is_kept(keep, pipe.count - 1)) {
      multiply_values(even);
      finish_values();
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
  if (warpgroup == 0 && warp == 0 && lane == 0) request(kept, {});
}

static_assert(SHARED_AT + sizeof(Shared) <= SHARED_BYTES, "shared memory");

extern "C" __global__ void __launch_bounds__(128 + 128 * CONSUMERS, 1)
    skip_softmax(const __grid_constant__ Maps maps, const __grid_constant__ Plan p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const u32 smem = u32(__cvta_generic_to_shared(memory)), barriers = smem + BARRIERS_AT;
  Shared& shared = *reinterpret_cast<Shared*>(memory + SHARED_AT);
  if (threadIdx.x == 0) {
    shared.requests_made = 0;
    for (u32 x = 0; x < VOTES; x++) shared.kept[x] = 0;
    for (u32 b = 0; b < EMPTY; b++) mbarrier_init(barriers + 8 * b, 1);
    for (u32 b = EMPTY; b < BARRIERS; b++) mbarrier_init(barriers + 8 * b, 4 * CONSUMERS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), group = warp >> 2;
  if (group == 0) {
    take_producer_registers();
    if (threadIdx.x == 0) produce_keys(maps, p, smem, shared);
    if (threadIdx.x == 32) produce_values(maps, smem, shared);
  } else {
    take_consumer_registers();
    consume(maps, p, smem, shared, group - 1, warp & 3);
  }
}
