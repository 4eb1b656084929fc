// How the kernels cut a call into blocks: a function of shape, dtype and alignment alone, never of the device, so that
// the same call is added up in the same order everywhere. Plain C++: kdcore._C shows it to the tests.
#pragma once
#include <cstdint>

namespace kdcore::cuda {

enum class Dtype { f32, f64, f16, bf16 };
enum class Normalize { none, per_class, instance };  // the order is that of the ops' argument

constexpr int kWarp = 32;
constexpr int kThreads = 256;                // of a block
constexpr int kRowLanes = kThreads / kWarp;  // rows side by side in a pass over columns
constexpr int64_t kColumnPad = 128;          // arrays over classes are padded to it: wide words never cross their end
constexpr int64_t kTileClasses = 2048;       // a block has at most so many classes in its registers
constexpr double kLargestExponent = 40;      // of e; up to it no sum or product of exponentials leaves float's range

// What the cut depends on. alignment: bytes, a power of two up to 16, that divides every address and row in use.
struct Cut {
  int64_t rows, classes;
  int itemsize, alignment;
  bool by_class;  // coefficients of its own for each class
  bool bounded;   // exponentials need no maximum
  bool sums;      // the gradient's sums over each class are wanted
  bool whole;     // a row may not be cut: its own statistics come first
};

struct Plan {
  // passes over columns: a block is kRowLanes rows of kWarp threads, a thread has `vector` classes
  int vector;
  bool wide;       // its classes are neighbours, read as one word; else they lie kWarp apart
  int64_t tiles;   // blocks side by side
  int64_t chunk;   // rows of a block
  int64_t chunks;  // blocks one above the other
  // the pass over rows
  bool tiled;  // it finds the sums over classes as well: a thread keeps its classes
  int row_vector;
  bool row_wide;
  int across;         // threads on a row
  int groups;         // rows side by side
  int batch;          // rows of a thread at a time
  int64_t row_chunk;  // rows of a block
  int64_t row_chunks;
  int64_t splits;   // blocks on a row
  int64_t segment;  // classes of each
  int64_t padded;   // classes in arrays over them

  int threads() const { return across * groups; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

// Classes of a thread in a tile, of kThreads at most.
constexpr int kNarrowTile = 4;  // up to 1024 classes
constexpr int kWideTile = 8;    // up to kTileClasses
constexpr int kDoubleTile = 2;  // float64: up to 512

inline bool is_wide(const Cut& cut, int vector) {
  const int word = vector * cut.itemsize;
  return cut.alignment >= (word < 16 ? word : 16);
}

inline Plan make_plan(const Cut& cut) {
  Plan plan{};
  plan.padded = round_up(cut.classes, kColumnPad);
  plan.vector = cut.itemsize == 8 ? 2 : 4;
  plan.wide = is_wide(cut, plan.vector);
  plan.tiles = ceil_div(cut.classes, kWarp * plan.vector);
  plan.chunk = clamp(round_up(ceil_div(cut.rows * plan.tiles, 256), kRowLanes), 4 * kRowLanes, 1024);
  plan.chunks = ceil_div(cut.rows, plan.chunk);

  const int64_t most = cut.itemsize == 8 ? kDoubleTile * kThreads : kTileClasses;
  plan.tiled = cut.sums && cut.by_class && cut.bounded && cut.classes <= most;
  plan.splits = 1;
  plan.segment = cut.classes;
  if (plan.tiled) {
    const bool narrow = cut.classes <= kNarrowTile * kThreads;
    plan.row_vector = cut.itemsize == 8 ? kDoubleTile : narrow ? kNarrowTile : kWideTile;
    plan.batch = 1;
    plan.across = static_cast<int>(round_up(ceil_div(cut.classes, plan.row_vector), kWarp));
    plan.groups = kThreads / plan.across;
    plan.row_chunk = clamp(round_up(ceil_div(cut.rows, 256), plan.groups), plan.groups, round_up(256, plan.groups));
  } else {
    plan.row_vector = plan.vector;
    plan.batch = cut.by_class ? 2 : 1;
    plan.across = kWarp;
    // more rows side by side share each class's coefficients in the cache
    const int most = cut.by_class ? 2 * kWarp : kThreads;
    while (plan.across < most && plan.across * plan.row_vector < cut.classes) plan.across *= 2;
    plan.groups = kThreads / plan.across;
    plan.row_chunk = plan.groups * plan.batch;
    const int64_t blocks = ceil_div(cut.rows, plan.row_chunk), span = plan.across * plan.row_vector;
    if (!cut.whole && blocks > 0) {
      plan.segment = round_up(ceil_div(cut.classes, clamp(1024 / blocks, 1, ceil_div(cut.classes, 2 * span))), span);
      plan.splits = ceil_div(cut.classes, plan.segment);
    }
  }
  plan.row_wide = is_wide(cut, plan.row_vector);
  plan.row_chunks = ceil_div(cut.rows, plan.row_chunk);
  return plan;
}

}  // namespace kdcore::cuda
