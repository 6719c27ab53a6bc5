// Products of compact kernels on a CPU, in float32, as custom calls of XLA.
//
// Blocks: a block of W, or two panels of activations, is copied into the order in which a tile of
// kRows x kCols sums in registers reads it (as BLIS does), so that what is left is multiply-adds.
// Single entries: the tokens are the contiguous axis. One entry then multiplies a vector of tokens,
// and an output (y, dx) or an input (dW) stays in registers while the entries that need it pass.
//
// native_library.py compiles this file for the processor it runs on; native_cpu.py calls it.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "native_tiles.h"

namespace {

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using FloatsOut = ffi::ResultBuffer<ffi::F32>;
using IntsOut = ffi::ResultBuffer<ffi::S32>;

// ---- Blocks ------------------------------------------------------------------------------------

bool all_below(const Ints& panels, int64_t limit) {
  const int32_t* at = panels.typed_data();
  return std::all_of(at, at + panels.element_count(),
                     [=](int32_t panel) { return 0 <= panel && panel < limit; });
}

// Blocks in the order of their panels: those of panel p are order[start[p]] and on, up to
// order[start[p + 1] - 1].
std::pair<std::vector<int64_t>, std::vector<int64_t>> by_panel(const int32_t* panel, int64_t blocks,
                                                               int64_t panels) {
  std::vector<int64_t> start(panels + 2), order(blocks);
  for (int64_t i = 0; i < blocks; ++i) ++start[panel[i] + 2];
  std::partial_sum(start.begin(), start.end(), start.begin());
  for (int64_t i = 0; i < blocks; ++i) order[start[panel[i] + 1]++] = i;
  return {std::move(start), std::move(order)};
}

ffi::Error outside() {
  return ffi::Error::InvalidArgument("index of a compact kernel: a block lies outside the kernel");
}

// Panel target[i] of y += panel source[i] of x @ block i, or its transpose.
ffi::Error BlockSpmm(ffi::ThreadPool pool, Floats x, Floats values, Ints source, Ints target,
                     bool transposed, int64_t most_tokens, FloatsOut y) {
  const int64_t tokens = x.dimensions()[0], inputs = x.dimensions()[1];
  const int64_t width = y->dimensions()[1], blocks = source.dimensions()[0];
  int64_t rows = values.dimensions()[1], cols = values.dimensions()[2];
  const int64_t size = rows * cols;
  if (transposed) std::swap(rows, cols);
  if (values.dimensions()[0] < blocks || inputs % rows || width % cols ||
      !all_below(source, inputs / rows) || !all_below(target, width / cols))
    return outside();
  const float *x_data = x.typed_data(), *w_data = values.typed_data();
  const int32_t *at_source = source.typed_data(), *at_target = target.typed_data();
  float* y_data = y->typed_data();

  // A panel of y stays in the cache while blocks are added to it.
  const int64_t panels = width / cols;
  const auto [start, order] = by_panel(at_target, blocks, panels);
  // With fewer tokens, packing the block would take as long as multiplying by it.
  constexpr int64_t kFewest = 48;
  const int64_t share = std::max(kFewest, divide_up(tokens, threads(pool)));
  const int64_t tiles = divide_up(tokens, kRows);
  const int64_t parts = std::min(tiles, divide_up(tokens, share) * divide_up(share, most_tokens));
  // Where the tokens do not occupy all threads, the panels are divided as well.
  const bool all_busy = parts == 0 || parts >= threads(pool);
  const int64_t groups = all_busy ? 1 : std::min(panels, divide_up(4 * threads(pool), parts));
  parallel(pool, parts * groups, [=, &start = start, &order = order](int64_t task) {
    const int64_t part = task / groups, group = task % groups;
    const int64_t first = part * tiles / parts * kRows;
    const int64_t last = std::min(tokens, (part + 1) * tiles / parts * kRows);
    float* packed = scratch(0, divide_up(cols, kCols) * cols_panel(rows));
    for (int64_t p = group * panels / groups; p < (group + 1) * panels / groups; ++p) {
      float* c = y_data + p * cols;
      if (start[p] == start[p + 1]) {
        for (int64_t t = first; t < last; ++t) std::memset(c + t * width, 0, sizeof(float) * cols);
      }
      for (int64_t i = start[p]; i < start[p + 1]; ++i) {
        const float* w = w_data + order[i] * size;
        if (transposed) {
          pack_transposed(w, rows, cols, packed);
        } else {
          pack_cols(w, cols, rows, cols, packed);
        }
        const float* a = x_data + first * inputs + at_source[order[i]] * rows;
        add_product(a, kRows * inputs, inputs, 1, packed, rows, c + first * width, width,
                    last - first, cols, i > start[p]);
      }
    }
  });
  return ffi::Error::Success();
}

// Block i of dw = (panel row[i] of x)^T @ panel col[i] of dy.
ffi::Error BlockSddmm(ffi::ThreadPool pool, Floats x, Floats dy, Ints row, Ints col,
                      int64_t most_tokens, FloatsOut dw) {
  const int64_t tokens = x.dimensions()[0], k = x.dimensions()[1], n = dy.dimensions()[1];
  const int64_t blocks = row.dimensions()[0];
  const int64_t rows = dw->dimensions()[1], cols = dw->dimensions()[2];
  if (k % rows || n % cols || !all_below(row, k / rows) || !all_below(col, n / cols))
    return outside();
  const float *x_data = x.typed_data(), *dy_data = dy.typed_data();
  const int32_t *at_row = row.typed_data(), *at_col = col.typed_data();
  float* dw_data = dw->typed_data();
  if (tokens == 0) std::memset(dw_data, 0, sizeof(float) * dw->element_count());

  // A task is a run of blocks in the order of one of their panels, which is packed once for all of
  // them that share it: the one that takes longer to pack, or of equal ones that of which there are
  // fewer.
  const bool by_row = rows != cols ? rows > cols : k <= n;
  const std::vector<int64_t> order =
      (by_row ? by_panel(at_row, blocks, k / rows) : by_panel(at_col, blocks, n / cols)).second;
  const int64_t tasks = std::min(blocks, 4 * threads(pool)), most = std::min(most_tokens, tokens);
  parallel(pool, tasks, [=, &order](int64_t task) {
    float* a = scratch(0, divide_up(rows, kRows) * rows_panel(most));
    float* b = scratch(1, divide_up(cols, kCols) * cols_panel(most));
    for (int64_t t = 0; t < tokens; t += most) {
      const int64_t depth = std::min(most, tokens - t);
      int32_t packed_row = -1, packed_col = -1;
      for (int64_t i = task * blocks / tasks; i < (task + 1) * blocks / tasks; ++i) {
        const int32_t x_panel = at_row[order[i]], dy_panel = at_col[order[i]];
        if (x_panel != packed_row) {
          const int64_t first = t * k + x_panel * rows;
          pack_rows(x_data + first, k, depth, rows, tokens * k - first, a);
        }
        if (dy_panel != packed_col) pack_cols(dy_data + t * n + dy_panel * cols, n, depth, cols, b);
        packed_row = x_panel, packed_col = dy_panel;
        add_product(a, rows_panel(depth), 1, kRowStep, b, depth, dw_data + order[i] * rows * cols,
                    cols, rows, cols, t > 0);
      }
    }
  });
  return ffi::Error::Success();
}

// ---- Single entries ----------------------------------------------------------------------------

struct Entry {
  int32_t from;
  float value;
};

constexpr int64_t kInputs = 1024;  // Of a pass: with 64 tokens each, half of an L2 cache.
constexpr int64_t kTokens = 64;    // Of one dot of dW.
constexpr int64_t kBand = 256;     // Rows of W in a task of dW, and
constexpr int64_t kColumns = 128;  // its columns: a fifth of them are 6,500 sums.

bool ascends(const int32_t* first, const int32_t* last, int64_t limit) {
  if (first == last) return true;
  bool wrong = *first < 0 || last[-1] >= limit;
  for (const int32_t* at = first + 1; at < last; ++at) wrong |= at[0] <= at[-1];
  return !wrong;
}

ffi::Error unordered() {
  return ffi::Error::InvalidArgument(
      "index of a compact kernel: must ascend within A and within B\\A, and lie in the kernel");
}

ffi::Error unfit() {
  return ffi::Error::InvalidArgument("the sizes of native_cpu.py and native_cpu.cc differ");
}

// For V vectors of tokens: y[t, o] (+)= the sum of value * x_t[from, t] over the entries
// start[o] … start[o + 1] - 1.
template <int V>
void sum_entries(const Entry* entries, const int32_t* start, const float* x_t, float* y,
                 int64_t width, int64_t tokens, bool add) {
  constexpr int64_t kTile = V * kLanes, kOutputs = 16;  // 16 floats of y are one line of a cache
  float sums_t[kOutputs * kTile];
  for (int64_t first = 0; first < width; first += kOutputs) {
    const int64_t outputs = std::min(kOutputs, width - first);
    for (int64_t o = 0; o < outputs; ++o) {
      Vector sums[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[v] = Vector{};
      const Entry* end = entries + start[first + o + 1];
      for (const Entry* entry = entries + start[first + o]; entry < end; ++entry) {
        const float* x = x_t + entry->from * kTile;
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[v] += entry->value * load(x + v * kLanes);
      }
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(sums_t + o * kTile + v * kLanes, sums[v]);
    }
    float* at = y + first;
    transpose(sums_t, kTile, outputs, tokens, at, width, add);
  }
}

// y = x @ W, or x @ W^T, for the entries of W at ascending `index`. The last two results are
// working memory: the entries in the order in which they are read, and where the run of each output
// begins.
ffi::Error EntrySpmm(ffi::ThreadPool pool, Floats x, Floats values, Ints index, bool transposed,
                     FloatsOut y, FloatsOut sorted, IntsOut starts) {
  const int64_t tokens = x.dimensions()[0], inputs = x.dimensions()[1];
  const int64_t width = y->dimensions()[1], count = index.dimensions()[0];
  const int64_t across = transposed ? inputs : width, passes = divide_up(inputs, kInputs);
  if (values.dimensions()[0] != count ||
      static_cast<int64_t>(sorted->element_count()) != 2 * count ||
      static_cast<int64_t>(starts->element_count()) != passes * width + 2)
    return unfit();
  const int32_t* at = index.typed_data();
  if (!ascends(at, at + count, inputs * width)) return unordered();
  const float *x_data = x.typed_data(), *w_data = values.typed_data();
  float* y_data = y->typed_data();
  auto* entries = reinterpret_cast<Entry*>(sorted->typed_data());
  int32_t* start = starts->typed_data();

  // A counting sort by pass, then output; start[i + 2] counts run i, so that adding up the counts
  // and then taking places leaves in start[i] where run i begins.
  auto each = [=](auto&& take) {
    for (int64_t e = 0, row = 0, row_start = 0; e < count; ++e) {
      while (at[e] >= row_start + across) ++row, row_start += across;
      const int64_t col = at[e] - row_start;
      const int64_t output = transposed ? row : col, from = transposed ? col : row;
      take(e, from / kInputs * width + output, from);
    }
  };
  std::memset(start, 0, sizeof(int32_t) * (passes * width + 2));
  each([=](int64_t, int64_t run, int64_t) { ++start[run + 2]; });
  for (int64_t run = 0; run < passes * width; ++run) start[run + 2] += start[run + 1];
  each([=](int64_t e, int64_t run, int64_t from) {
    entries[start[run + 1]++] = {static_cast<int32_t>(from), w_data[e]};
  });

  auto in_tiles = [&](auto vectors) {
    constexpr int V = decltype(vectors)::value;
    constexpr int64_t kTile = V * kLanes;
    parallel(pool, divide_up(tokens, kTile), [=](int64_t task) {
      const int64_t first = task * kTile, here = std::min(kTile, tokens - first);
      float* x_t = scratch(0, inputs * kTile);
      transpose_padded(x_data + first * inputs, inputs, here, inputs, x_t, kTile);
      for (int64_t pass = 0; pass < passes; ++pass) {
        sum_entries<V>(entries, start + pass * width, x_t, y_data + first * width, width, here,
                       pass > 0);
      }
    });
  };
  const int64_t share = divide_up(tokens, threads(pool));
  if (share > 4 * kLanes) in_tiles(std::integral_constant<int, 8>{});
  else if (share > 2 * kLanes) in_tiles(std::integral_constant<int, 4>{});
  else if (share > kLanes) in_tiles(std::integral_constant<int, 2>{});
  else in_tiles(std::integral_constant<int, 1>{});
  return ffi::Error::Success();
}

// For each row r and each i from row[r] to row[r + 1] - 1: sums[i] += x_t[r] * dy_t[column[i]], of
// kTokens products as many in each lane.
void add_dots(const float* x_t, const float* dy_t, const int32_t* row, int64_t rows,
              const int32_t* column, float* sums) {
  constexpr int V = kTokens / kLanes;
  for (int64_t r = 0; r < rows; ++r, x_t += kTokens) {
    Vector x[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) x[v] = load(x_t + v * kLanes);
    for (int64_t i = row[r]; i < row[r + 1]; ++i) {
      const float* dy = dy_t + column[i] * kTokens;
      Vector even = load(sums + i * kLanes), odd{};
#pragma GCC unroll 16
      for (int v = 0; v < V; v += 2) {
        even += x[v] * load(dy + v * kLanes);
        odd += x[v + 1] * load(dy + (v + 1) * kLanes);
      }
      store(sums + i * kLanes, even + odd);
    }
  }
}

// dw[e] = x[:, k] . dy[:, n] for the entry (k, n) at index[e]; the first `forward` of them ascend,
// and so do the others. The last three results are working memory: x and dy in tiles of kTokens
// tokens, which are the contiguous axis, and where the entries of each row begin in each part of
// kColumns columns.
ffi::Error EntrySddmm(ffi::ThreadPool pool, Floats x, Floats dy, Ints index, int64_t forward,
                      FloatsOut dw, FloatsOut x_out, FloatsOut dy_out, IntsOut starts) {
  const int64_t tokens = x.dimensions()[0], k = x.dimensions()[1], n = dy.dimensions()[1];
  const int64_t count = index.dimensions()[0], tiles = divide_up(tokens, kTokens);
  const int64_t parts = divide_up(n, kColumns), runs = k * parts + 1;
  if (forward < 0 || forward > count ||
      static_cast<int64_t>(x_out->element_count()) != tiles * k * kTokens ||
      static_cast<int64_t>(dy_out->element_count()) != tiles * n * kTokens ||
      static_cast<int64_t>(starts->element_count()) != 2 * runs)
    return unfit();
  const int32_t* at = index.typed_data();
  if (!ascends(at, at + forward, k * n) || !ascends(at + forward, at + count, k * n))
    return unordered();
  const float *x_data = x.typed_data(), *dy_data = dy.typed_data();
  float *x_t = x_out->typed_data(), *dy_t = dy_out->typed_data(), *dw_data = dw->typed_data();
  int32_t* start = starts->typed_data();

  auto find_runs = [=](int64_t e, int64_t end, int32_t* to) {
    for (int64_t row = 0; row < k; ++row) {
      for (int64_t part = 0; part < parts; ++part) {
        *to++ = static_cast<int32_t>(e);
        const int64_t bound = row * n + std::min(n, (part + 1) * kColumns);
        while (e < end && at[e] < bound) ++e;
      }
    }
    *to = static_cast<int32_t>(end);
  };
  auto in_tiles = [=](const float* from, int64_t width, int64_t tile, float* to) {
    const int64_t first = tile * kTokens, here = std::min(kTokens, tokens - first);
    transpose_padded(from + first * width, width, here, width, to + first * width, kTokens);
  };
  parallel(pool, 2 + 2 * tiles, [=](int64_t task) {
    if (task == 0) return find_runs(0, forward, start);
    if (task == 1) return find_runs(forward, count, start + runs);
    const int64_t tile = (task - 2) / 2;
    if (task % 2) return in_tiles(x_data, k, tile, x_t);
    in_tiles(dy_data, n, tile, dy_t);
  });

  const int64_t bands = divide_up(k, kBand);
  parallel(pool, parts * bands, [=](int64_t task) {
    const int64_t part = task / bands, first = task % bands * kBand;
    const int64_t rows = std::min(kBand, k - first);
    // The entries of this task row by row, those of A before those of B\A.
    auto each = [=](auto&& take) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int set = 0; set < 2; ++set) {
          const int32_t* run = start + set * runs + (first + r) * parts + part;
          for (int64_t e = run[0]; e < run[1]; ++e) take(r, e);
        }
      }
    };
    int64_t here = 0;
    each([&](int64_t, int64_t) { ++here; });
    auto* row = reinterpret_cast<int32_t*>(scratch(0, rows + 1 + here));
    int32_t* column = row + rows + 1;
    std::memset(row, 0, sizeof(int32_t) * (rows + 1));
    int64_t i = 0;
    each([&](int64_t r, int64_t e) {
      column[i++] = static_cast<int32_t>(at[e] - (first + r) * n - part * kColumns);
      row[r + 1] = static_cast<int32_t>(i);
    });
    for (int64_t r = 0; r < rows; ++r) row[r + 1] = std::max(row[r + 1], row[r]);
    float* sums = scratch(1, here * kLanes);
    std::memset(sums, 0, sizeof(float) * here * kLanes);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      add_dots(x_t + (tile * k + first) * kTokens, dy_t + (tile * n + part * kColumns) * kTokens,
               row, rows, column, sums);
    }
    i = 0;
    each([&](int64_t, int64_t e) { dw_data[e] = sum(load(sums + kLanes * i++)); });
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(topkast_block_spmm, BlockSpmm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Attr<bool>("transposed")
                                  .Attr<int64_t>("most_tokens")
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(topkast_block_sddmm, BlockSddmm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Attr<int64_t>("most_tokens")
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(topkast_entry_spmm, EntrySpmm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Attr<bool>("transposed")
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Ints>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(topkast_entry_sddmm, EntrySddmm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Ints>()
                                  .Attr<int64_t>("forward")
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Ints>());
