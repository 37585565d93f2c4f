// Vertical-slash attention on Hopper: in each program three teams of four warps compute, each fed by a thread of its own.
//
// No two blocks of queries see the same keys, so teams share nothing: each takes the next block of 64 queries of a head,
// the longest first, until none is left. Its loader reads from the index where the pieces of the block's runs start, and which
// of the gathered columns lie between them; pieces and columns come as tiles of 64 keys, and tiles without a key are left out.
// Macros beside those of hopper.cuh: TEAMS; SHARED_BYTES.

#include "hopper.cuh"

constexpr u32 TEAM_BYTES = SLOT_BYTES + UNITS * UNIT_BYTES;  // a team's queries, later its output, and its ring
constexpr u32 BARS_AT = TEAMS * TEAM_BYTES;
constexpr u32 Q_FULL = 0, Q_EMPTY = 1, FULL = 2, EMPTY = FULL + UNITS, BARS = EMPTY + UNITS;
constexpr u32 TEAMS_AT = BARS_AT + (TEAMS * BARS * 8 + 15) / 16 * 16;

struct Maps { TensorMap q, k, v, k_columns, v_columns, out; };
struct Plan {
  const int* starts;          // [batch, heads, rows, most]
  const int* counts;          // [batch, heads, rows]
  const unsigned char* kept;  // [batch, heads, rows, width], width a multiple of 64
  const int* before;          // [batch, heads, rows]
  int* next;                  // the next item, for all programs
  int length, rows, most, width, heads, groups, items;
  float scale_log2;
};

enum Kind { PIECE, COLUMNS, END };
struct alignas(16) Tile {
  int kind, first;  // the first key, of a piece; which tile of columns
  u64 counted;      // which columns of a tile count
};
struct alignas(16) Item { int more, row, head, batch; };
struct Team {
  Item item;
  Tile tiles[UNITS];
};

// ------------------------------------------------------------------------------------------------------------ the loader

template <int DIMS> __device__ __forceinline__ void fetch(const TensorMap* map, u32 to, u32 full, int first, int head, int batch) {
  bar_expect(full, K_HALF * (DIMS / 64));
#pragma unroll
  for (int h = 0; h < DIMS / 64; h++) load_4d(to + h * K_HALF, map, full, h * 64, first, head, batch);
}

// 64 bytes of 0 or 1 as bits.
__device__ __forceinline__ u64 bits_of(const unsigned char* bytes) {
  u64 bits = 0;
#pragma unroll
  for (int x = 0; x < 8; x++) bits |= (reinterpret_cast<const u64*>(bytes)[x] * 0x0102040810204080ull >> 56) << (8 * x);
  return bits;
}

struct Loader {
  const Maps& maps;
  const Plan& p;
  u32 bars, units;
  Team& team;
  Ring ring;
  Item item;
  Tile last;
  bool any;

  __device__ __forceinline__ u32 next_unit() {
    const u32 at = ring.at();
    bar_wait(bars + 8 * (EMPTY + at), ring.phase() ^ 1);
    ring.count++;
    return at;
  }
  __device__ __forceinline__ void values() {
    if (!any) return;
    const u32 at = next_unit(), full = bars + 8 * (FULL + at), to = units + at * UNIT_BYTES;
    if (last.kind == PIECE)
      fetch<V_DIM>(&maps.v, to, full, last.first, item.head / p.groups, item.batch);
    else
      fetch<V_DIM>(&maps.v_columns, to, full, last.first * KEYS, item.head, item.batch);
  }
  // The keys of a tile, and the values of the tile before it.
  __device__ __forceinline__ void tile(const Tile& t) {
    const u32 at = next_unit(), full = bars + 8 * (FULL + at), to = units + at * UNIT_BYTES;
    team.tiles[at] = t;
    if (t.kind == PIECE)
      fetch<DIM>(&maps.k, to, full, t.first, item.head / p.groups, item.batch);
    else if (t.kind == COLUMNS)
      fetch<DIM>(&maps.k_columns, to, full, t.first * KEYS, item.head, item.batch);
    else
      bar_arrive(full);
    values();
    last = t;
    any = t.kind != END;
  }
};

__device__ void load(const Maps& maps, const Plan& p, u32 bars, u32 slot, Team& team) {
  Loader loader{maps, p, bars, slot + SLOT_BYTES, team, {0}, {}, {}, false};
  for (u32 n = 0;; n++) {
    const int i = atomicAdd(p.next, 1), both = p.items / p.rows;
    bar_wait(bars + 8 * Q_EMPTY, n & 1 ^ 1);
    Item& item = loader.item;
    item.more = i < p.items;
    item.row = p.rows - 1 - i / both;
    item.head = i % both % p.heads;
    item.batch = i % both / p.heads;
    team.item = item;
    if (!item.more) {
      bar_arrive(bars + 8 * Q_FULL);
      return;
    }
    bar_expect(bars + 8 * Q_FULL, Q_BYTES);
#pragma unroll
    for (int h = 0; h < DIM / 64; h++)
      load_4d(slot + h * Q_HALF, &maps.q, bars + 8 * Q_FULL, h * 64, item.row * TEAM_ROWS, item.head, item.batch);
    const u64 place = u64(item.batch * p.heads + item.head) * p.rows + item.row;
    const int count = p.counts[place], before = p.before[place];
    const int* starts = p.starts + place * p.most;
    const unsigned char* kept = p.kept + place * p.width;
    for (int t = 0; t < count; t++) loader.tile({PIECE, starts[t], 0});
    for (int t = 0; t * KEYS < before; t++) {
      const u64 counted = bits_of(kept + t * KEYS);
      if (counted) loader.tile({COLUMNS, t, counted});
    }
    loader.tile({END, 0, 0});
  }
}

// ------------------------------------------------------------------------------------------------------------- the teams

__device__ __forceinline__ void mask(float (&s)[KEYS / 2], const Rows& r, const Tile& t, int start, int length) {
  if (t.kind == COLUMNS) {
    // Columns lie before the last run, and so before all queries of the block.
    const u64 counted = t.counted >> (2 * (threadIdx.x & 3));
#pragma unroll
    for (int e = 0; e < KEYS / 2; e++) s[e] = counted >> (8 * (e >> 2) + (e & 1)) & 1 ? s[e] : NONE;
  } else if (t.first + KEYS - 1 > start) {
    mask_tile(s, r, t.first, 0, length, length, 0, 0, start);
  }
}

__device__ void compute(const Maps& maps, const Plan& p, u32 bars, u32 slot, const Team& own, int team, int warp) {
  const int lane = threadIdx.x & 31;
  const u32 units = slot + SLOT_BYTES;
  float s[KEYS / 2], o[V_DIM / 2], shrink[2];
  u32 operand[KEYS / 4];
  Rows r;
  Ring ring = {0};
  for (u32 n = 0;; n++) {
    bar_wait(bars + 8 * Q_FULL, n & 1);
    const Item item = own.item;
    if (!item.more) return;
    const int start = item.row * TEAM_ROWS;
    r.position[0] = start + warp * 16 + (lane >> 2);
    r.position[1] = r.position[0] + 8;
#pragma unroll
    for (int x = 0; x < 2; x++) r.peak[x] = NONE, r.shift[x] = r.total[x][0] = r.total[x][1] = 0.0f;
    int add = 0;
    u32 k_at = ring.at();
    bar_wait(bars + 8 * (FULL + k_at), ring.phase());
    ring.count++;
    if (own.tiles[k_at].kind == END) {
#pragma unroll
      for (int e = 0; e < V_DIM / 2; e++) o[e] = 0.0f;
      if (lane == 0) bar_arrive(bars + 8 * (EMPTY + k_at));
    } else {
      mma_fence();
      multiply_keys(s, slot, units + k_at * UNIT_BYTES);
      mma_commit();
      mma_wait<0>();
      pin(s);
      mask(s, r, own.tiles[k_at], start, p.length);
      if (lane == 0) bar_arrive(bars + 8 * (EMPTY + k_at));
      softmax(s, r, p.scale_log2, shrink);
      to_operand(s, operand);
      while (true) {
        // The product of the next tile's keys and that of this tile's values run together, and the softmax of the former
        // overlaps with the latter.
        k_at = ring.at();
        bar_wait(bars + 8 * (FULL + k_at), ring.phase());
        ring.count++;
        const Tile t = own.tiles[k_at];
        if (t.kind == END) break;
        mma_fence();
        multiply_keys(s, slot, units + k_at * UNIT_BYTES);
        mma_commit();
        const u32 v_at = ring.at(), v_phase = ring.phase();
        bar_wait(bars + 8 * (FULL + v_at), v_phase);
        ring.count++;
        multiply_values(o, operand, units + v_at * UNIT_BYTES, add);
        mma_commit();
        add = 1;
        mma_wait<1>();
        pin(s);
        if (lane == 0) bar_arrive(bars + 8 * (EMPTY + k_at));
        mask(s, r, t, start, p.length);
        const bool grows = softmax(s, r, p.scale_log2, shrink);
        // A loop on a barrier, which the assembler moves no arithmetic across: the softmax overlaps with the product.
        bar_wait(bars + 8 * (FULL + v_at), v_phase);
        mma_wait<0>();
        pin(o);
        if (lane == 0) bar_arrive(bars + 8 * (EMPTY + v_at));
        if (grows) {
#pragma unroll
          for (int e = 0; e < V_DIM / 2; e++) o[e] *= shrink[(e >> 1) & 1];
        }
        to_operand(s, operand);
      }
      const u32 v_at = ring.at();
      if (lane == 0) bar_arrive(bars + 8 * (EMPTY + k_at));
      bar_wait(bars + 8 * (FULL + v_at), ring.phase());
      ring.count++;
      mma_fence();
      multiply_values(o, operand, units + v_at * UNIT_BYTES, add);
      mma_commit();
      mma_wait<0>();
      pin(o);
      if (lane == 0) bar_arrive(bars + 8 * (EMPTY + v_at));
    }
    float total[2] = {r.total[0][0] + r.total[0][1], r.total[1][0] + r.total[1][1]}, factor[2];
    normalizers(total, factor);
    stage(o, factor, team, warp, slot);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (lane == 0) {
#pragma unroll
      for (int h = 0; h < V_DIM / 64; h++)
        store_4d(&maps.out, slot + warp * 2048 + h * Q_HALF, h * 64, start + warp * 16, item.head, item.batch);
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
      bar_arrive(bars + 8 * Q_EMPTY);
    }
  }
}

static_assert(TEAMS_AT + TEAMS * sizeof(Team) <= SHARED_BYTES, "shared memory");

extern "C" __global__ void __launch_bounds__(128 + 128 * TEAMS, 1)
    vertical_slash(const __grid_constant__ Maps maps, const __grid_constant__ Plan p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const u32 smem = u32(__cvta_generic_to_shared(memory));
  if (threadIdx.x < TEAMS) {
    const u32 bars = smem + BARS_AT + threadIdx.x * BARS * 8;
    bar_init(bars + 8 * Q_FULL, 1);
    bar_init(bars + 8 * Q_EMPTY, 4);
    for (int b = 0; b < UNITS; b++) {
      bar_init(bars + 8 * (FULL + b), 1);
      bar_init(bars + 8 * (EMPTY + b), 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), group = warp >> 2;
  const int team = group == 0 ? warp : group - 1;
  const u32 bars = smem + BARS_AT + team * BARS * 8, slot = smem + team * TEAM_BYTES;
  Team& own = reinterpret_cast<Team*>(memory + TEAMS_AT)[team];
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    if (team < TEAMS && (threadIdx.x & 31) == 0) load(maps, p, bars, slot, own);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    compute(maps, p, bars, slot, own, team, warp & 3);
  }
}
