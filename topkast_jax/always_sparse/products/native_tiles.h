// Tiles of sums in registers, the panels that they read, and what runs them in parallel: for the
// files that native_library.py compiles, each of which has its own copy of all of it.

#ifndef TOPKAST_NATIVE_TILES_H_
#define TOPKAST_NATIVE_TILES_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// The sums of a tile, two vectors of W and one broadcast value fit in the vector registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 12;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 6;
#else
constexpr int kLanes = 4, kRows = 6;
#endif
constexpr int kCols = 2 * kLanes;

typedef float Vector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector load(const float* at) { return *reinterpret_cast<const Vector*>(at); }
inline void store(float* at, Vector v) { *reinterpret_cast<Vector*>(at) = v; }

inline float sum(Vector v) {
  float lanes[kLanes], total = 0;
  store(lanes, v);
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
constexpr int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }

// Memory that grows, aligned to a vector.
class Memory {
 public:
  // What it held before is lost where it has to grow.
  float* at_least(int64_t floats) {
    if (size_ < floats) {
      held_.reset(new float[floats + kLanes]);
      size_ = floats;
    }
    const auto address = reinterpret_cast<uintptr_t>(held_.get());
    return reinterpret_cast<float*>(round_up(address, 4 * kLanes));
  }

 private:
  std::unique_ptr<float[]> held_;
  int64_t size_ = 0;
};

// Memory of this thread that the next call with the same `which` overwrites.
float* scratch(int which, int64_t floats) {
  thread_local Memory held[2];
  return held[which].at_least(floats);
}

// XLA says 0 where it cannot tell.
int64_t threads(const ffi::ThreadPool& pool) {
  return std::max<int64_t>(1, pool.num_threads());
}

// run(0) … run(tasks - 1) on the threads of XLA's pool and on this one, which waits for tasks that
// others have begun and never for a thread to become free. XLA catches no exceptions.
template <typename Run>
void parallel(ffi::ThreadPool& pool, int64_t tasks, const Run& run) noexcept {
  struct Shared {
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t done = 0;
  };
  auto shared = std::make_shared<Shared>();
  // A thread that comes after the last task was taken finds none, and does not touch `run`.
  std::function<void()> work = [shared, tasks, &run] {
    int64_t finished = 0;
    for (int64_t i; (i = shared->next.fetch_add(1)) < tasks; ++finished) run(i);
    if (finished == 0) return;
    std::lock_guard<std::mutex> lock(shared->mutex);
    shared->done += finished;
    if (shared->done == tasks) shared->all_done.notify_one();
  };
  const int64_t helpers = std::min(threads(pool), tasks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(work));
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done == tasks; });
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define TOPKAST_SHUFFLES
#endif
#endif

#ifdef TOPKAST_SHUFFLES
constexpr bool kShuffles = true;

// The lanes of a and b in turn, from the lower or the upper half of both.
template <int half, int... lane>
Vector zip(Vector a, Vector b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, (lane / 2 + half * kLanes / 2 + lane % 2 * kLanes)...);
}

// v[r][c] and v[c][r] change places. A zip of v[i] with v[i + kLanes / 2] moves the highest bit of
// the row below the lowest of the lane: after as many as the row has bits, both are exchanged.
inline void transpose_tile(Vector* v) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
  Vector zipped[kLanes];
#pragma GCC unroll 4
  for (int bits = 1; bits < kLanes; bits *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      zipped[2 * i] = zip<0>(v[i], v[i + kLanes / 2], lanes);
      zipped[2 * i + 1] = zip<1>(v[i], v[i + kLanes / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = zipped[i];
  }
}
#else
constexpr bool kShuffles = false;
inline void transpose_tile(Vector*) {}
#endif

// to[c * to_stride + r] = from[r * from_stride + c], or += with `add`.
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t cols, float* to,
               int64_t to_stride, bool add = false) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t c = 0; c < cols; c += kLanes) {
      const float* source = from + r * from_stride + c;
      float* target = to + c * to_stride + r;
      if (kShuffles && r + kLanes <= rows && c + kLanes <= cols) {
        Vector v[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) v[i] = load(source + i * from_stride);
        transpose_tile(v);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          float* at = target + i * to_stride;
          store(at, add ? load(at) + v[i] : v[i]);
        }
      } else {
        const int64_t height = std::min<int64_t>(kLanes, rows - r);
        const int64_t width = std::min<int64_t>(kLanes, cols - c);
        for (int64_t j = 0; j < width; ++j) {
          for (int64_t i = 0; i < height; ++i) {
            float* at = target + j * to_stride + i;
            *at = add ? *at + source[i * from_stride + j] : source[i * from_stride + j];
          }
        }
      }
    }
  }
}

// The same into rows of `to_width` >= rows floats, with zeros after the last.
void transpose_padded(const float* from, int64_t from_stride, int64_t rows, int64_t cols, float* to,
                      int64_t to_width) {
  if (rows < to_width) std::memset(to, 0, sizeof(float) * cols * to_width);
  transpose(from, from_stride, rows, cols, to, to_width);
}

// For m < M and n < valid: c[m * c_row + n] = (add ? c[m * c_row + n] : 0) + the sum over k < depth
// of a[m * a_row + k * a_step] * b[k * kCols + n]. V vectors hold the valid columns.
template <int M, int V>
void add_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t depth,
              float* c, int64_t c_row, int64_t valid, bool add) {
  Vector sums[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < V; ++v) sums[m][v] = Vector{};
  }
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += kCols) {
    Vector columns[V];
    for (int v = 0; v < V; ++v) columns[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < V; ++v) sums[m][v] += a[m * a_row] * columns[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m, c += c_row) {
    if (valid == V * kLanes) {
      for (int v = 0; v < V; ++v) {
        float* at = c + v * kLanes;
        store(at, add ? load(at) + sums[m][v] : sums[m][v]);
      }
    } else {
      float row[kCols];
      for (int v = 0; v < V; ++v) store(row + v * kLanes, sums[m][v]);
      for (int64_t n = 0; n < valid; ++n) c[n] = add ? c[n] + row[n] : row[n];
    }
  }
}

// The same for `rows` <= M rows, a number that is known only now.
template <int M = kRows>
void add_rows(int64_t rows, const float* a, int64_t a_row, int64_t a_step, const float* b,
              int64_t depth, float* c, int64_t c_row, int64_t valid, bool add) {
  if (rows < M) {
    if constexpr (M > 1) add_rows<M - 1>(rows, a, a_row, a_step, b, depth, c, c_row, valid, add);
  } else if (valid > kLanes) {
    add_tile<M, 2>(a, a_row, a_step, b, depth, c, c_row, valid, add);
  } else {
    add_tile<M, 1>(a, a_row, a_step, b, depth, c, c_row, valid, add);
  }
}

// A packed panel holds `depth` steps: kCols columns of b each, or kRows rows of a in whole vectors.
// A gap of one cache line keeps panels of a power of two out of the same sets of lines.
constexpr int64_t kGap = 16, kRowStep = round_up(kRows, kLanes);
constexpr int64_t cols_panel(int64_t depth) { return depth * kCols + kGap; }
constexpr int64_t rows_panel(int64_t depth) { return depth * kRowStep + kGap; }

// from [rows, cols] of a row stride -> to [cols / kCols] panels of [rows, kCols], with zeros after
// the last column.
void pack_cols(const float* from, int64_t stride, int64_t rows, int64_t cols, float* to) {
  for (int64_t r = 0; r < rows; ++r, from += stride) {
    for (int64_t j = 0; j < cols; j += kCols) {
      float* at = to + j / kCols * cols_panel(rows) + r * kCols;
      if (j + kCols <= cols) {
        store(at, load(from + j));
        store(at + kLanes, load(from + j + kLanes));
      } else {
        for (int64_t n = 0; n < kCols; ++n) at[n] = j + n < cols ? from[j + n] : 0;
      }
    }
  }
}

// The same from the transpose, [cols, rows].
void pack_transposed(const float* from, int64_t rows, int64_t cols, float* to) {
  for (int64_t j = 0; j < cols; j += kCols, to += cols_panel(rows)) {
    transpose_padded(from + j * rows, rows, std::min<int64_t>(kCols, cols - j), rows, to, kCols);
  }
}

// c [rows, cols] = (add ? c : 0) + a @ b, tile by tile: tiles of a lie a_tile apart, b is packed.
void add_product(const float* a, int64_t a_tile, int64_t a_row, int64_t a_step, const float* b,
                 int64_t depth, float* c, int64_t c_row, int64_t rows, int64_t cols, bool add) {
  for (int64_t j = 0; j < cols; j += kCols, b += cols_panel(depth)) {
    const int64_t valid = std::min<int64_t>(kCols, cols - j);
    const float* tile = a;
    for (int64_t r = 0; r < rows; r += kRows, tile += a_tile) {
      add_rows(std::min<int64_t>(kRows, rows - r), tile, a_row, a_step, b, depth, c + r * c_row + j,
               c_row, valid, add);
    }
  }
}

// from [depth, rows] of a stride -> to [rows / kRows] panels of [depth, kRowStep], of which kRows
// count. `readable` floats are there to be read.
void pack_rows(const float* from, int64_t stride, int64_t depth, int64_t rows, int64_t readable,
               float* to) {
  for (int64_t k = 0; k < depth; ++k, to += kRowStep) {
    float* at = to;
    for (int64_t r = 0; r < rows; r += kRows, at += rows_panel(depth)) {
      const int64_t first = k * stride + r;
      if (first + kRowStep <= readable) {
        for (int v = 0; v < kRowStep; v += kLanes) store(at + v, load(from + first + v));
      } else {
        for (int64_t m = 0; m < std::min<int64_t>(kRows, rows - r); ++m) at[m] = from[first + m];
      }
    }
  }
}

}  // namespace

#endif  // TOPKAST_NATIVE_TILES_H_
