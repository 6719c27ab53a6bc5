// Convolutions of images on a CPU, in float32, and both their gradients, as custom calls of XLA;
// the sums that a normalisation of images needs, two in one pass; and maxima over windows.
//
// The taps of one row of the kernel see contiguous floats of a line of the image, because the
// channels are the contiguous axis. One row of taps is therefore one product of registers, without
// a copy of the image for each tap: add_tile reads its rows of `a` where they lie.
//
// native_library.py compiles this file for the processor it runs on; native_convolutions.py calls
// it.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "native_tiles.h"

namespace {

using Array = ffi::Buffer<ffi::F32, 4>;
using ArrayOut = ffi::ResultBuffer<ffi::F32, 4>;
using Matrix = ffi::Buffer<ffi::F32, 2>;
using MatrixOut = ffi::ResultBuffer<ffi::F32, 2>;
using Row = ffi::Buffer<ffi::F32, 1>;
using Places = ffi::Buffer<ffi::S8, 4>;
using PlacesOut = ffi::ResultBuffer<ffi::S8, 4>;
using Numbers = ffi::Span<const int64_t>;

ffi::Error unfit() {
  return ffi::Error::InvalidArgument("shapes of images, kernel and result do not fit each other");
}

// A stride and a padding before the first entry for each axis.
bool are_steps(Numbers strides, Numbers padding) {
  return strides.size() == 2 && padding.size() == 2 && strides[0] > 0 && strides[1] > 0;
}

// Outputs along one axis that see their inputs through the same taps of the kernel: output
// first + step * m, for m < count, sees input begin + stride * m + t through entry taps[t].
struct Outputs {
  int64_t first, step, count, stride, begin;
  std::vector<int64_t> taps;

  int64_t size() const { return static_cast<int64_t>(taps.size()); }
  // How many inputs in a row they see together.
  int64_t seen() const { return stride * (count - 1) + size(); }
};

std::vector<Outputs> along(int64_t outputs, int64_t size, int64_t stride, int64_t padding) {
  Outputs all{0, 1, outputs, stride, -padding, {}};
  for (int64_t k = 0; k < size; ++k) all.taps.push_back(k);
  return {all};
}

// The same for the gradient by the images: entry r of an image has seen output o through the tap
// k = r + padding - stride * o, so that entries of one remainder by the stride share their taps.
std::vector<Outputs> along_transposed(int64_t outputs, int64_t size, int64_t stride,
                                      int64_t padding) {
  std::vector<Outputs> found;
  for (int64_t r = 0; r < std::min(stride, outputs); ++r) {
    Outputs same{r, stride, divide_up(outputs - r, stride), 1, 0, {}};
    for (int64_t k = size - 1; k >= 0; --k) {
      if ((r + padding - k) % stride == 0) same.taps.push_back(k);
    }
    if (!same.taps.empty()) same.begin = (r + padding - same.taps[0]) / stride;
    found.push_back(std::move(same));
  }
  return found;
}

// Lines of an image, `stride` floats apart, and the end of what may be read.
struct Lines {
  const float* data;
  int64_t stride;
  const float* end;
};

// `lines` lines of `width` pixels from column `first` on, which may lie outside of them: where they
// are, or, where columns outside are seen, in scratch(1) with zeros there.
Lines seen_lines(const float* image, int64_t lines, int64_t width, int64_t channels, int64_t first,
                 int64_t columns) {
  const int64_t stride = width * channels;
  if (first >= 0 && first + columns <= width)
    return {image + first * channels, stride, image + lines * stride};
  const int64_t left = std::clamp<int64_t>(-first, 0, columns);
  const int64_t right = std::clamp<int64_t>(width - first, left, columns);
  float* copy = scratch(1, lines * columns * channels);
  float* to = copy;
  for (int64_t i = 0; i < lines; ++i, to += columns * channels) {
    const float* from = image + i * stride + (first + left) * channels;
    std::fill(to, to + left * channels, 0.0f);
    std::copy(from, from + (right - left) * channels, to + left * channels);
    std::fill(to + right * channels, to + columns * channels, 0.0f);
  }
  return {copy, columns * channels, to};
}

// y = the convolution of x with the kernel; or, with `transposed`, of x, the gradient of its
// outputs, the gradient y of its images.
ffi::Error Convolution(ffi::ThreadPool pool, Array x, Array kernel, Numbers strides,
                       Numbers padding, bool transposed, ArrayOut y) {
  const int64_t images = x.dimensions()[0], height = x.dimensions()[1], width = x.dimensions()[2];
  const int64_t inputs = x.dimensions()[3], outputs = y->dimensions()[3];
  const int64_t y_height = y->dimensions()[1], y_width = y->dimensions()[2];
  const int64_t rows = kernel.dimensions()[0], columns = kernel.dimensions()[1];
  if (!are_steps(strides, padding) || y->dimensions()[0] != images ||
      kernel.dimensions()[transposed ? 3 : 2] != inputs ||
      kernel.dimensions()[transposed ? 2 : 3] != outputs)
    return unfit();
  const float *x_data = x.typed_data(), *w_data = kernel.typed_data();
  float* y_data = y->typed_data();

  const auto outputs_along = transposed ? along_transposed : along;
  const int64_t panels = divide_up(outputs, kCols);
  if (y->element_count() == 0) return ffi::Error::Success();
  Memory memory;
  for (const Outputs& down : outputs_along(y_height, rows, strides[0], padding[0])) {
    for (const Outputs& across : outputs_along(y_width, columns, strides[1], padding[1])) {
      // Each row of taps is packed into panels of its own, one after the other.
      const int64_t depth = across.size() * inputs, taps = down.size() * across.size();
      float* packed = memory.at_least(down.size() * panels * cols_panel(depth));
      parallel(pool, taps * panels, [&](int64_t task) {
        const int64_t tap = task / panels, p = task % panels, j = p * kCols;
        const int64_t row = tap / across.size(), column = tap % across.size();
        const int64_t here = std::min<int64_t>(kCols, outputs - j);
        const float* w =
            w_data + (down.taps[row] * columns + across.taps[column]) * inputs * outputs;
        float* to = packed + (row * panels + p) * cols_panel(depth) + column * inputs * kCols;
        if (transposed) {
          transpose_padded(w + j * inputs, inputs, here, inputs, to, kCols);
        } else {
          pack_cols(w + j, outputs, inputs, here, to);
        }
      });

      // Lines first … last - 1 of outputs of one image, from panels p … p_end - 1 of the kernel.
      auto convolve = [&](int64_t image, int64_t first, int64_t last, int64_t p, int64_t p_end) {
        const int64_t top = down.begin + down.stride * first;
        const int64_t low = std::clamp<int64_t>(top, 0, height);
        const int64_t high = std::clamp<int64_t>(
            top + down.stride * (last - first - 1) + down.size(), low, height);
        const Lines seen = seen_lines(x_data + (image * height + low) * width * inputs, high - low,
                                      width, inputs, across.begin, across.seen());
        const int64_t parts = divide_up(across.count, kRows), c_row = across.step * outputs;
        for (; p < p_end; ++p) {
          const int64_t valid = std::min<int64_t>(kCols, outputs - p * kCols);
          for (int64_t line = first; line < last; ++line) {
            const int64_t y_line = image * y_height + down.first + down.step * line;
            float* c_line = y_data + (y_line * y_width + across.first) * outputs + p * kCols;
            const int64_t at = down.begin + down.stride * line;
            for (int64_t part = 0; part < parts; ++part) {
              const int64_t m = part * across.count / parts;
              const int64_t here = (part + 1) * across.count / parts - m;
              float* c = c_line + m * c_row;
              bool add = false;
              for (int64_t t = 0; t < down.size(); ++t) {
                if (at + t < low || at + t >= high) continue;
                const float* a =
                    seen.data + (at + t - low) * seen.stride + m * across.stride * inputs;
                const float* b = packed + (t * panels + p) * cols_panel(depth);
                add_rows(here, a, across.stride * inputs, 1, b, depth, c, c_row, valid, add);
                add = true;
              }
              for (int64_t i = 0; !add && i < here; ++i) std::fill_n(c + i * c_row, valid, 0.0f);
            }
          }
        }
      };
      // A task takes some lines of an image and the whole kernel or, where that is the larger one,
      // some panels of the kernel and all images.
      constexpr int64_t kLines = 1 << 16;  // Floats of a task, at both ends: a quarter of an L2.
      const int64_t line = down.stride * across.seen() * inputs + across.count * outputs;
      const int64_t most = std::clamp<int64_t>(kLines / line, 1, down.count);
      const int64_t groups = divide_up(down.count, most);
      const int64_t image_tasks = images * groups;
      const int64_t panel_tasks = std::min(panels, 4 * threads(pool));
      auto on_image = [&](int64_t task, int64_t p, int64_t p_end) {
        const int64_t group = task % groups;
        convolve(task / groups, group * down.count / groups, (group + 1) * down.count / groups, p,
                 p_end);
      };
      if (kernel.element_count() <= x.element_count()) {
        parallel(pool, image_tasks, [&](int64_t task) { on_image(task, 0, panels); });
      } else {
        parallel(pool, panel_tasks, [&](int64_t task) {
          for (int64_t i = 0; i < image_tasks; ++i)
            on_image(i, task * panels / panel_tasks, (task + 1) * panels / panel_tasks);
        });
      }
    }
  }
  return ffi::Error::Success();
}

// to = the sum of `parts` arrays of `size` floats, which follow each other.
void add_parts(ffi::ThreadPool& pool, const float* partial, int64_t parts, int64_t size,
               float* to) {
  constexpr int64_t kTask = 1 << 13;
  parallel(pool, divide_up(size, kTask), [=](int64_t task) {
    const int64_t first = task * kTask, last = std::min(size, first + kTask);
    std::fill(to + first, to + last, 0.0f);
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t i = first; i < last; ++i) to[i] += partial[part * size + i];
    }
  });
}

// dw = the gradient by the kernel, from images x and the gradient dy of the outputs.
ffi::Error KernelGradient(ffi::ThreadPool pool, Array x, Array dy, Numbers strides,
                          Numbers padding, ArrayOut dw) {
  const int64_t images = x.dimensions()[0], height = x.dimensions()[1], width = x.dimensions()[2];
  const int64_t inputs = x.dimensions()[3], outputs = dy.dimensions()[3];
  const int64_t dy_height = dy.dimensions()[1], dy_width = dy.dimensions()[2];
  const int64_t rows = dw->dimensions()[0], columns = dw->dimensions()[1];
  if (!are_steps(strides, padding) || dy.dimensions()[0] != images ||
      dw->dimensions()[2] != inputs || dw->dimensions()[3] != outputs)
    return unfit();
  const float *x_data = x.typed_data(), *dy_data = dy.typed_data();
  float* dw_data = dw->typed_data();
  if (dy.element_count() == 0) {
    std::fill_n(dw_data, dw->element_count(), 0.0f);
    return ffi::Error::Success();
  }

  const int64_t stride = strides[0], phases = std::min(stride, rows);
  const int64_t depth = columns * inputs, tiles = divide_up(depth, kRows);
  std::vector<int64_t> starts;  // Where each tile begins in a row of the kernel, and where it ends.
  for (int64_t tile = 0; tile <= tiles; ++tile) starts.push_back(tile * depth / tiles);

  // Where there are few sums, each part of the pixels has its own ones, and every pixel is packed
  // once. Otherwise each thread sums some tiles over all pixels. The number of parts and the chunks
  // do not depend on the number of threads, so that the rounding does not either.
  constexpr int64_t kFewSums = 1 << 16, kMostParts = 16, kPixels = 1024;
  const int64_t sums = dw->element_count(), pixels = images * dy_height * dy_width;
  int64_t parts = 1;
  while (sums <= kFewSums && parts < kMostParts && 2 * parts * kPixels <= pixels) parts *= 2;

  // A chunk of dy, whole images or lines of one, is packed into panels, and what a row of the
  // kernel has seen of x into strips, of the entries of one tile each. Every strip is then
  // multiplied by all panels.
  constexpr int64_t kChunk = 1 << 17;  // Floats that are packed: a quarter of an L2 cache.
  const int64_t packed_tiles = parts > 1 ? tiles : divide_up(tiles, 2);  // Of one of two threads.
  const int64_t floats = round_up(outputs, kCols) + packed_tiles * phases * kRowStep;
  const int64_t most = std::max<int64_t>(1, kChunk / floats / dy_width);
  const int64_t most_images = std::clamp<int64_t>(most / dy_height, 1, images);
  const int64_t most_lines = std::min(most, dy_height);
  const int64_t groups = divide_up(dy_height, most_lines);
  const int64_t chunks = divide_up(images, most_images) * groups;
  parts = std::min(parts, chunks);

  // sums_to = the sums over chunks chunk … chunk_end - 1, for i_begin <= i < i_end: row i % rows of
  // the kernel, tile i / rows.
  auto sum_chunks = [&](int64_t chunk, int64_t chunk_end, int64_t i_begin, int64_t i_end,
                        float* sums_to) {
    for (bool begun = false; chunk < chunk_end; ++chunk, begun = true) {
      const int64_t n = chunk / groups * most_images, first = chunk % groups * most_lines;
      const int64_t here = std::min(most_images, images - n);
      const int64_t lines = std::min(most_lines, dy_height - first);
      const int64_t depth_here = here * lines * dy_width;
      const int64_t strip_lines = lines + (rows - 1) / stride;
      const int64_t line_step = dy_width * kRowStep;
      const int64_t strip_size = here * phases * strip_lines * line_step + kGap;
      const int64_t panel_size = cols_panel(depth_here);
      const int64_t tile_begin = i_begin / rows, tile_end = divide_up(i_end, rows);
      const int64_t panels = divide_up(outputs, kCols) * panel_size;
      float* packed = scratch(0, panels + (tile_end - tile_begin) * strip_size);
      float* strips = packed + panels;
      pack_cols(dy_data + (n * dy_height + first) * dy_width * outputs, outputs, depth_here,
                outputs, packed);
      // Of several images all lines, so that these follow each other.
      const int64_t top = stride * first - padding[0];
      const int64_t bottom = top + stride * (lines - 1) + rows;
      const int64_t low = here > 1 ? 0 : std::clamp<int64_t>(top, 0, height);
      const int64_t high = here > 1 ? height : std::clamp<int64_t>(bottom, low, height);
      const Lines seen = seen_lines(x_data + (n * height + low) * width * inputs,
                                    here * (high - low), width, inputs, -padding[1],
                                    strides[1] * (dy_width - 1) + columns);
      // In a strip, lines of x that are `stride` apart, as one row of the kernel sees them, lie
      // next to each other. All strips are made in one pass over x.
      for (int64_t line = 0; line < here * phases * strip_lines; ++line) {
        const int64_t phase = line / strip_lines % phases;
        const int64_t at = top + stride * (line % strip_lines) + phase;
        if (at < low || at >= high) continue;
        const int64_t image = line / strip_lines / phases;
        const float* from = seen.data + (image * (high - low) + at - low) * seen.stride;
        float* to = strips + line * line_step;
        for (int64_t k = 0; k < dy_width; ++k, from += strides[1] * inputs, to += kRowStep) {
          for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
            const float* entries = from + starts[tile];
            float* into = to + (tile - tile_begin) * strip_size;
            if (entries + kRowStep <= seen.end) {
              for (int v = 0; v < kRowStep; v += kLanes) store(into + v, load(entries + v));
            } else {
              std::copy_n(entries, starts[tile + 1] - starts[tile], into);
            }
          }
        }
      }
      for (int64_t i = i_begin; i < i_end; ++i) {
        const int64_t row = i % rows, tile = i / rows, m = starts[tile];
        const float* strip = strips + (tile - tile_begin) * strip_size;
        // The lines whose input lies in the image.
        const int64_t above = padding[0] - row;
        const int64_t begin = std::clamp<int64_t>(divide_up(above, stride) - first, 0, lines);
        const int64_t end =
            std::clamp<int64_t>(divide_up(height + above, stride) - first, begin, lines);
        for (int64_t j = 0; j < outputs; j += kCols) {
          const float* panel = packed + j / kCols * panel_size;
          for (int64_t image = 0; image < here; ++image) {
            const int64_t line = (image * phases + row % stride) * strip_lines + row / stride;
            const float* b = panel + (image * lines + begin) * dy_width * kCols;
            add_rows(starts[tile + 1] - m, strip + (line + begin) * line_step, 1, kRowStep, b,
                     (end - begin) * dy_width, sums_to + (row * depth + m) * outputs + j, outputs,
                     std::min<int64_t>(kCols, outputs - j), begun || image > 0);
          }
        }
      }
    }
  };

  const int64_t units = tiles * rows;
  if (parts == 1) {
    const int64_t tasks = std::min(units, threads(pool));
    parallel(pool, tasks, [&](int64_t task) {
      sum_chunks(0, chunks, task * units / tasks, (task + 1) * units / tasks, dw_data);
    });
    return ffi::Error::Success();
  }
  Memory memory;
  float* partial = memory.at_least(parts * sums);
  parallel(pool, parts, [&](int64_t part) {
    sum_chunks(part * chunks / parts, (part + 1) * chunks / parts, 0, units, partial + part * sums);
  });
  add_parts(pool, partial, parts, sums, dw_data);
  return ffi::Error::Success();
}

// ---- Sums over channels ------------------------------------------------------------------------

// A map of each channel, x -> (x - shift) * factor + constant.
struct Affine {
  const float *shift, *factor, *constant;
};

// For each channel: sums[0] += the sum of y, sums[1] += the sum of y * (x - shift) over the rows of
// x and y; with kRectified over those where the map of x is positive.
template <bool kRectified>
void add_sums(const float* x, const float* y, const Affine& map, int64_t rows, int64_t channels,
              float* sums) {
  constexpr int64_t kTogether = 4;  // Rows, for which a sum is loaded and stored once.
  constexpr int64_t kAhead = 2 * kTogether;  // Rows until those that are fetched meanwhile.
  for (int64_t r = 0; r < rows; r += kTogether) {
    const int64_t here = std::min(kTogether, rows - r);
    int64_t c = 0;
    for (; here == kTogether && c + kLanes <= channels; c += kLanes) {
      Vector sum = load(sums + c), products = load(sums + channels + c);
      const Vector shift = load(map.shift + c);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kTogether; ++i) {
        __builtin_prefetch(x + (i + kAhead) * channels + c);
        __builtin_prefetch(y + (i + kAhead) * channels + c);
        Vector value = load(y + i * channels + c);
        const Vector centred = load(x + i * channels + c) - shift;
        if constexpr (kRectified) {
          value = centred * load(map.factor + c) + load(map.constant + c) > 0 ? value : Vector{};
        }
        sum += value;
        products += value * centred;
      }
      store(sums + c, sum);
      store(sums + channels + c, products);
    }
    for (; c < channels; ++c) {
      for (int64_t i = 0; i < here; ++i) {
        const float centred = x[i * channels + c] - map.shift[c];
        if (kRectified && !(centred * map.factor[c] + map.constant[c] > 0)) continue;
        sums[c] += y[i * channels + c];
        sums[channels + c] += y[i * channels + c] * centred;
      }
    }
    x += kTogether * channels, y += kTogether * channels;
  }
}

// sums [2, channels]: of y, and of y * (x - shift), over all rows of x and y [rows, channels]; with
// `rectified` over those where (x - shift) * factor + constant is positive.
ffi::Error ChannelSums(ffi::ThreadPool pool, Matrix x, Matrix y, Row shift, Row factor,
                       Row constant, bool rectified, MatrixOut sums) {
  const int64_t rows = x.dimensions()[0], channels = x.dimensions()[1];
  if (y.dimensions()[0] != rows || y.dimensions()[1] != channels ||
      shift.dimensions()[0] != channels || factor.dimensions()[0] != channels ||
      constant.dimensions()[0] != channels || sums->dimensions()[0] != 2 ||
      sums->dimensions()[1] != channels)
    return unfit();
  const float *x_data = x.typed_data(), *y_data = y.typed_data();
  const Affine map{shift.typed_data(), factor.typed_data(), constant.typed_data()};
  const auto add = rectified ? add_sums<true> : add_sums<false>;
  // Parts of a fixed size, so that the sums do not depend on the number of threads.
  constexpr int64_t kPart = 256;
  const int64_t parts = divide_up(rows, kPart), width = 2 * channels;
  Memory memory;
  float* partial = memory.at_least(parts * width);
  parallel(pool, parts, [=](int64_t part) {
    const int64_t first = part * kPart;
    std::fill_n(partial + part * width, width, 0.0f);
    add(x_data + first * channels, y_data + first * channels, map, std::min(kPart, rows - first),
        channels, partial + part * width);
  });
  add_parts(pool, partial, parts, width, sums->typed_data());
  return ffi::Error::Success();
}

// ---- Maxima over windows -----------------------------------------------------------------------

typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

// Windows of 3×3 with a stride of 2 and one line of padding on each side.

// y = the maximum of each window of x, chosen = which of its entries that is, row by row: the first
// of equal ones, and a NaN if there is one.
ffi::Error MaxPool(ffi::ThreadPool pool, Array x, ArrayOut y, PlacesOut chosen) {
  const int64_t images = x.dimensions()[0], height = x.dimensions()[1], width = x.dimensions()[2];
  const int64_t rows = divide_up(height, 2), columns = divide_up(width, 2);
  const int64_t channels = x.dimensions()[3];
  for (const auto shape : {y->dimensions(), chosen->dimensions()}) {
    if (shape[0] != images || shape[1] != rows || shape[2] != columns || shape[3] != channels)
      return unfit();
  }
  const float* x_data = x.typed_data();
  float* y_data = y->typed_data();
  int8_t* chosen_data = chosen->typed_data();
  parallel(pool, images * rows, [=](int64_t line) {
    for (int64_t column = 0; column < columns; ++column) {
      const float* entries[9];  // Those of the window that lie in the image, and which they are.
      int32_t places[9];
      int count = 0;
      for (int k = 0; k < 9; ++k) {
        const int64_t i = 2 * (line % rows) - 1 + k / 3, j = 2 * column - 1 + k % 3;
        if (i < 0 || i >= height || j < 0 || j >= width) continue;
        entries[count] = x_data + ((line / rows * height + i) * width + j) * channels;
        places[count++] = k;
      }
      const int64_t to = (line * columns + column) * channels;
      int64_t c = 0;
      for (; c + kLanes <= channels; c += kLanes) {
        Vector most = load(entries[0] + c);
        Integers place = Integers{} + places[0];
        for (int t = 1; t < count; ++t) {
          const Vector entry = load(entries[t] + c);
          const Integers more = (entry > most) | (entry != entry);
          most = more ? entry : most;
          place = more ? Integers{} + places[t] : place;
        }
        store(y_data + to + c, most);
        const auto bytes = __builtin_convertvector(place, Bytes);
        std::memcpy(chosen_data + to + c, &bytes, sizeof(bytes));
      }
      for (; c < channels; ++c) {
        int best = 0;
        for (int t = 1; t < count; ++t) {
          const float entry = entries[t][c];
          if (entry > entries[best][c] || entry != entry) best = t;
        }
        y_data[to + c] = entries[best][c];
        chosen_data[to + c] = static_cast<int8_t>(places[best]);
      }
    }
  });
  return ffi::Error::Success();
}

// dx = the gradient by the images, from the gradient dy of the maxima.
ffi::Error MaxPoolGradient(ffi::ThreadPool pool, Places chosen, Array dy, ArrayOut dx) {
  const int64_t images = dx->dimensions()[0], height = dx->dimensions()[1];
  const int64_t width = dx->dimensions()[2], channels = dx->dimensions()[3];
  const int64_t rows = divide_up(height, 2), columns = divide_up(width, 2);
  for (const auto shape : {chosen.dimensions(), dy.dimensions()}) {
    if (shape[0] != images || shape[1] != rows || shape[2] != columns || shape[3] != channels)
      return unfit();
  }
  const int8_t* chosen_data = chosen.typed_data();
  const float* dy_data = dy.typed_data();
  float* dx_data = dx->typed_data();
  parallel(pool, images * height, [=](int64_t line) {
    const int64_t i = line % height;
    for (int64_t j = 0; j < width; ++j) {
      float* __restrict to = dx_data + (line * width + j) * channels;
      std::fill_n(to, channels, 0.0f);
      // An even line is in the middle of one window, an odd one is the last of one and the first of
      // the next. So it is with the columns.
      for (int64_t row = i / 2; row <= (i + 1) / 2 && row < rows; ++row) {
        for (int64_t column = j / 2; column <= (j + 1) / 2 && column < columns; ++column) {
          const auto place = static_cast<int8_t>(3 * (i - 2 * row + 1) + j - 2 * column + 1);
          const int64_t from = ((line / height * rows + row) * columns + column) * channels;
          const int8_t* places = chosen_data + from;
          const float* gradients = dy_data + from;
          for (int64_t c = 0; c < channels; ++c) {
            to[c] += places[c] == place ? gradients[c] : 0.0f;
          }
        }
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(topkast_convolution, Convolution,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Attr<Numbers>("strides")
                                  .Attr<Numbers>("padding")
                                  .Attr<bool>("transposed")
                                  .Ret<Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(topkast_convolution_kernel_gradient, KernelGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Attr<Numbers>("strides")
                                  .Attr<Numbers>("padding")
                                  .Ret<Array>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(topkast_channel_sums, ChannelSums,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrix>()
                                  .Arg<Matrix>()
                                  .Arg<Row>()
                                  .Arg<Row>()
                                  .Arg<Row>()
                                  .Attr<bool>("rectified")
                                  .Ret<Matrix>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(topkast_max_pool, MaxPool,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Ret<Places>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(topkast_max_pool_gradient, MaxPoolGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Places>()
                                  .Arg<Array>()
                                  .Ret<Array>());
