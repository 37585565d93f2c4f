// Attention over listed keys on Hopper: in each program a warp that loads and three teams of four warps that compute. It serves
// vertical-slash patterns, whose lists hold pieces of 64 keys that start anywhere, and patterns of whole key blocks.
//
// An item is three neighbouring blocks of 64 queries of one head, one for each team. What they see differs, but where runs of
// keys are long, most pieces of one are pieces of its neighbours: the loader merges the three lists, brings each tile of 64
// keys once, and says with it which teams take it; the others pass over it. Gathered columns are the same for all blocks of a
// head, of which each counts its own. Items of the query heads that share a key head run at the same time, so that keys come
// from the cache. Macros beside those of hopper.cuh: TEAMS; SHARED_BYTES. UNITS is the number of tiles in flight, of keys and
// values both.

#include "hopper.cuh"

constexpr int ITEMS = 8;  // more than the loader can be ahead of a team: every item takes at least one unit
constexpr u32 TILES_AT = TEAMS * SLOT_BYTES;
constexpr u32 PAIR_BYTES = K_HALF * ((DIM + V_DIM) / 64), VALUES = K_HALF * (DIM / 64);
constexpr u32 BARS_AT = TILES_AT + UNITS * PAIR_BYTES;
constexpr u32 Q_FULL = 0, ITEM_FULL = Q_FULL + TEAMS, K_FULL = ITEM_FULL + ITEMS, V_FULL = K_FULL + UNITS, EMPTY = V_FULL + UNITS,
              BARS = EMPTY + UNITS;
constexpr u32 SHARED_AT = BARS_AT + (BARS * 8 + 15) / 16 * 16;
constexpr int NEVER = 0x7fffffff, ALL = 1 << 30;

static_assert(UNITS < ITEMS, "an item could be overwritten before all teams have read it");

struct Maps { TensorMap q, k, v, k_columns, v_columns, out; };
struct Plan {
  const int* entries;         // [batch, heads, lists, most], ascending: where ``fold`` pieces start, in ``unit`` keys
  const int* counts;          // [batch, heads, lists]
  const unsigned char* kept;  // [batch, heads, rows, width], width a multiple of 64
  const int* before;          // [batch, heads, rows], or null where there are no columns
  const int* reach;           // [heads], or null where queries see all of their pieces
  const int* sinks;           // [heads]
  int* next;                  // the next item, for all programs
  int length, rows, fold, unit, most, width, heads, groups, items;  // ``fold`` rows share a list
  float scale_log2;
};

enum Kind { PIECE, COLUMNS, END };
struct alignas(16) Tile {
  int kind, first, teams, spare;  // the first key of a piece, or which tile of columns; the teams that take it, as bits
  u64 counted[TEAMS + TEAMS % 2];  // which columns of a tile count for a team
};
struct alignas(16) Item { int more, row, head, batch, reach, sinks; };
struct Shared {
  Item items[ITEMS];
  Tile tiles[UNITS];
};

// ------------------------------------------------------------------------------------------------------------ the loader

template <int DIMS> __device__ __forceinline__ void fetch(const TensorMap* map, u32 to, u32 full, int first, int head, int batch) {
  bar_expect(full, K_HALF * (DIMS / 64));
#pragma unroll
  for (int h = 0; h < DIMS / 64; h++) load_4d(to + h * K_HALF, map, full, h * 64, first, head, batch);
}

// The query heads of a key head next to each other, of each the last blocks, which see most, first.
__device__ __forceinline__ Item item_at(const Plan& p, int i) {
  const int thirds = (p.rows + TEAMS - 1) / TEAMS, both = i / (p.groups * thirds), rest = i % (p.groups * thirds);
  const int kv_heads = p.heads / p.groups;
  Item item;
  item.more = i < p.items;
  item.row = (thirds - 1 - rest / p.groups) * TEAMS;
  item.head = both % kv_heads * p.groups + rest % p.groups;
  item.batch = both / kv_heads;
  item.reach = item.more && p.reach ? p.reach[item.head] : ALL;
  item.sinks = item.more && p.reach ? p.sinks[item.head] : 0;
  return item;
}

__device__ void load(const Maps& maps, const Plan& p, u32 smem, Shared& shared) {
  const u32 bars = smem + BARS_AT;
  const int lane = threadIdx.x & 31;
  Ring ring = {0};
  // All lanes wait for the unit, since several write to its tile.
  const auto open = [&]() -> Tile& {
    bar_wait(bars + 8 * (EMPTY + ring.at()), ring.phase() ^ 1);
    return shared.tiles[ring.at()];
  };
  const auto send = [&](const TensorMap& k, const TensorMap& v, int first, int head, int batch) {
    const u32 at = ring.at(), to = smem + TILES_AT + at * PAIR_BYTES;
    __syncwarp();
    if (lane == 0) {
      fetch<DIM>(&k, to, bars + 8 * (K_FULL + at), first, head, batch);
      fetch<V_DIM>(&v, to + VALUES, bars + 8 * (V_FULL + at), first, head, batch);
    }
    ring.count++;
  };
  for (u32 n = 0;; n++) {
    int i = 0;
    if (lane == 0) i = atomicAdd(p.next, 1);
    const Item item = item_at(p, __shfl_sync(~0u, i, 0));
    if (lane == 0) {
      shared.items[n % ITEMS] = item;
      bar_arrive(bars + 8 * (ITEM_FULL + n % ITEMS));
    }
    if (!item.more) return;
    const int kv_head = item.head / p.groups;

    // Each of the first lanes walks its team's list; the smallest start of the three is the next tile.
    const int row = item.row + lane, lists = (p.rows + p.fold - 1) / p.fold, own_end = (row + 1) * TEAM_ROWS;
    const u64 list = u64(item.batch * p.heads + item.head) * lists + row / p.fold;
    const int* entry = p.entries + list * p.most;
    const int* end = entry + (lane < TEAMS && row < p.rows ? p.counts[list] : 0);
    int start = entry < end ? *entry * p.unit : NEVER, ahead = entry + 1 < end ? entry[1] * p.unit : NEVER, piece = 0;
    while (true) {
      // Of a block that several rows share, the first ones do not reach the last pieces.
      if (start >= own_end) start = NEVER;
      int first = start;
#pragma unroll
      for (int x = 1; x < TEAMS; x *= 2) first = min(first, __shfl_xor_sync(~0u, first, x));
      first = __shfl_sync(~0u, first, 0);
      if (first == NEVER) break;
      const bool mine = start == first;
      const u32 teams = __ballot_sync(~0u, mine);
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
      if (lane == 0) tile.kind = PIECE, tile.first = first, tile.teams = teams;
      send(maps.k, maps.v, first, kv_head, item.batch);
    }

    // Eight lanes for each team: every one turns 8 bytes of 0 or 1 into bits.
    const int team = lane >> 3;
    const bool reads = p.before && team < TEAMS && item.row + team < p.rows;
    const u64 place = u64(item.batch * p.heads + item.head) * p.rows + item.row + team;
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
      if ((lane & 7) == 0 && team < TEAMS) tile.counted[team] = counted;
      if (lane == 0) tile.kind = COLUMNS, tile.first = t, tile.teams = (some & 1) | (some >> 7 & 2) | (some >> 14 & 4);
      send(maps.k_columns, maps.v_columns, t * KEYS, item.head, item.batch);
    }

    Tile& tile = open();
    if (lane == 0) {
      tile.kind = END;
      // Both, so that their phases stay those of the ring.
      bar_arrive(bars + 8 * (K_FULL + ring.at()));
      bar_arrive(bars + 8 * (V_FULL + ring.at()));
    }
    ring.count++;
  }
}

// ------------------------------------------------------------------------------------------------------------- the teams

__device__ void compute(const Maps& maps, const Plan& p, u32 smem, const Shared& shared, int team, int warp) {
  const u32 bars = smem + BARS_AT, slot = smem + team * SLOT_BYTES, q_full = bars + 8 * (Q_FULL + team);
  const int lane = threadIdx.x & 31;
  float s[KEYS / 2], o[V_DIM / 2], shrink[2];
  u32 operand[KEYS / 4];
  Rows r;
  Ring ring = {0};
  int start, free_from, reach, sinks, kind, first;
  u64 counted;

  const auto release = [&](u32 at) {
    if (lane == 0) bar_arrive(bars + 8 * (EMPTY + at));
  };
  const auto keys_at = [&](u32 at) { return smem + TILES_AT + at * PAIR_BYTES; };
  // Pass over tiles of other teams, at most ``limit`` tiles in all: whether the tile before the ring is this team's, or an end.
  const auto find = [&](int limit) {
    for (int looked = 0; looked < limit; looked++) {
      const u32 at = ring.at();
      bar_wait(bars + 8 * (K_FULL + at), ring.phase());
      ring.count++;
      const Tile& tile = shared.tiles[at];
      kind = tile.kind, first = tile.first;
      const bool mine = kind == END || (tile.teams >> team & 1);
      if (mine) {
        if (kind == COLUMNS) counted = tile.counted[team];
        return true;
      }
      __syncwarp();
      release(at);
    }
    return false;
  };
  const auto mask = [&]() {
    if (kind == COLUMNS) {
      // Columns lie before the last run, and so before all queries of the block.
      const u64 bits = counted >> (2 * (threadIdx.x & 3));
#pragma unroll
      for (int e = 0; e < KEYS / 2; e++) s[e] = bits >> (8 * (e >> 2) + (e & 1)) & 1 ? s[e] : NONE;
    } else if ((first + KEYS - 1 > start) | (first < free_from)) {
      mask_tile(s, r, first, 0, p.length, reach, sinks, free_from, start);
    }
  };
  const auto rescale = [&]() {
#pragma unroll
    for (int e = 0; e < V_DIM / 2; e++) o[e] *= shrink[(e >> 1) & 1];
  };

  for (u32 n = 0;; n++) {
    bar_wait(bars + 8 * (ITEM_FULL + n % ITEMS), n / ITEMS & 1);
    const Item item = shared.items[n % ITEMS];
    if (!item.more) return;
    start = (item.row + team) * TEAM_ROWS;
    reach = item.reach, sinks = item.sinks, free_from = max(start + TEAM_ROWS - reach, 0);
    if (warp == 0 && lane == 0) {
      bar_expect(q_full, Q_BYTES);
#pragma unroll
      for (int h = 0; h < DIM / 64; h++) load_4d(slot + h * Q_HALF, &maps.q, q_full, h * 64, start, item.head, item.batch);
    }
    r.position[0] = start + warp * 16 + (lane >> 2);
    r.position[1] = r.position[0] + 8;
#pragma unroll
    for (int x = 0; x < 2; x++) r.peak[x] = NONE, r.shift[x] = r.total[x][0] = r.total[x][1] = 0.0f;
#pragma unroll
    for (int e = 0; e < V_DIM / 2; e++) o[e] = 0.0f;
    bar_wait(q_full, n & 1);

    bool holds = false;  // whether ``operand`` has the probabilities of the tile in unit ``held``
    u32 held = 0, held_phase = 0;
    while (true) {
      // While a unit is held no more than the others can be filled: further on than those this team must not wait.
      const bool found = find(holds ? UNITS - 1 : NEVER);
      const u32 at = (ring.count - 1) % UNITS, phase = (ring.count - 1) / UNITS & 1;
      if (holds && found && kind != END) {
        // The product of the next tile's keys and that of this tile's values run together, and the softmax of the former
        // overlaps with the latter.
        mma_fence();
        multiply_keys(s, slot, keys_at(at));
        mma_commit();
        bar_wait(bars + 8 * (V_FULL + held), held_phase);
        multiply_values(o, operand, keys_at(held) + VALUES, 1);
        mma_commit();
        mma_wait<1>();
        pin(s);
        mask();
        const bool grows = softmax(s, r, p.scale_log2, shrink);
        // A loop on a barrier, which the assembler moves no arithmetic across: the softmax overlaps with the product.
        bar_wait(bars + 8 * (V_FULL + held), held_phase);
        mma_wait<0>();
        pin(o);
        release(held);
        if (grows) rescale();
        to_operand(s, operand);
      } else {
        if (holds) {
          bar_wait(bars + 8 * (V_FULL + held), held_phase);
          mma_fence();
          multiply_values(o, operand, keys_at(held) + VALUES, 1);
          mma_commit();
          mma_wait<0>();
          pin(o);
          release(held);
          holds = false;
          if (!found) continue;
        }
        if (kind == END) {
          // A team without a tile comes here with nothing that held its lanes together since they read which one it is.
          __syncwarp();
          release(at);
          break;
        }
        mma_fence();
        multiply_keys(s, slot, keys_at(at));
        mma_commit();
        mma_wait<0>();
        pin(s);
        mask();
        if (softmax(s, r, p.scale_log2, shrink)) rescale();
        to_operand(s, operand);
      }
      holds = true;
      held = at, held_phase = phase;
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
    }
    // The next queries take the place of all four warps' outputs.
    asm volatile("bar.sync %0, 128;" ::"r"(1 + team) : "memory");
  }
}

static_assert(SHARED_AT + sizeof(Shared) <= SHARED_BYTES, "shared memory");

extern "C" __global__ void __launch_bounds__(128 + 128 * TEAMS, 1)
    lists(const __grid_constant__ Maps maps, const __grid_constant__ Plan p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const u32 smem = u32(__cvta_generic_to_shared(memory)), bars = smem + BARS_AT;
  if (threadIdx.x == 0) {
    for (u32 b = 0; b < EMPTY; b++) bar_init(bars + 8 * b, 1);
    for (u32 b = EMPTY; b < BARS; b++) bar_init(bars + 8 * b, 4 * TEAMS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  Shared& shared = *reinterpret_cast<Shared*>(memory + SHARED_AT);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), group = warp >> 2;
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    if (warp == 0) load(maps, p, smem, shared);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    compute(maps, p, smem, shared, group - 1, warp & 3);
  }
}
