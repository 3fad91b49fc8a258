// bn_act: y = act((x - mean) * rstd * weight + bias [+ residual]), batch or running statistics; formulas in element.h.
//
// Both directions are two passes: sums per channel, then a map over the elements. Bytes are the bound: the second pass
// should find its inputs in cache.
//   NCHW  a task is one channel and does both passes: its N planes of HW elements stay in L2 between them. At most C
//         threads have work.
//   NHWC  a task is a block of rows (pixels), so the passes are separate; the second walks backwards and starts on what
//         the first left in cache.
// The partition and the order of every sum follow from the shape alone: results do not depend on the thread count.
//
// Sums: fp32 over at most a few thousand elements, then fp64. Variance: deviations from a shift taken from the same
// block (for the first elements, whose mean it is, the cancellation is bounded by the block's length), merged with Chan.
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>

#include "cpu/isa.h"
#include "tensor.h"

namespace fastres {
namespace {

constexpr int64_t kTile = 2048;            // channels of an NHWC task: whole rows, since a narrower tile breaks the
                                           // streams that the prefetcher follows (twice as slow at 2048 channels)
constexpr int64_t kChunkElements = 65536;  // elements of an NHWC task, about
constexpr int64_t kMinRows = 48;           // rows of an NHWC task: fewer, and the work per channel shows
constexpr int64_t kMaxRows = 1024;         // more, and the shift's cancellation shows
constexpr int64_t kFlush = 128;            // NHWC rows summed in fp32 before they go to fp64
constexpr int64_t kRun = 4096;             // NCHW elements summed in fp32, over 4 vectors, before they go to fp64
constexpr int64_t kShiftElements = 8;      // elements whose mean is the first shift; a power of two keeps integers exact
constexpr int64_t kChannelBlock = 64;      // channels of a task of the per-channel step between the passes

// ---- Terms: what an element adds to the two sums of its channel. `centre` is the shift, or the mean.

template <class T>
struct StatisticsTerm {
  static constexpr bool kStatistics = true;
  const T* x;

  template <int W>
  FASTRES_HD void add(int64_t i, Float<W> centre, Float<W>& a, Float<W>& b) const {
    const Float<W> d = load<W>(x + i) - centre;
    a += d;
    b += d * d;
  }
};

// With kStore, g goes to dresidual on the way, and the second pass reads it in place of dy and y: one stream less.
template <class T, bool kMask, bool kStore>
struct GradientTerm {
  static constexpr bool kStatistics = false;
  const T* dy;
  const T* y;
  const T* x;
  T* dresidual;

  template <int W>
  FASTRES_HD void add(int64_t i, Float<W> centre, Float<W>& a, Float<W>& b) const {
    Float<W> g = load<W>(dy + i);
    if constexpr (kMask) g = relu_gradient(g, load<W>(y + i));
    if constexpr (kStore) store<W>(dresidual + i, g);
    a += g;
    b += g * (load<W>(x + i) - centre);
  }
};

// ---- Maps: an element's outputs from its inputs and its channel's parameters (a vector of channels in NHWC, one
// channel broadcast in NCHW).

template <int W, bool kBroadcast>
FASTRES_HD Float<W> parameter(const float* p, int64_t c) {
  if constexpr (kBroadcast) return broadcast<W>(p[c]);
  return load<W>(p + c);
}

template <class T, bool kResidual>
struct ForwardMap {
  const T* x;
  const T* residual;
  T* y;
  const float* mean;   // [C]
  const float* scale;  // [C]
  const float* bias;   // [C]
  float floor;

  template <int W>
  struct Parameters {
    Float<W> mean, scale, bias;
  };
  template <int W, bool kBroadcast>
  FASTRES_HD Parameters<W> parameters(int64_t c) const {
    return {parameter<W, kBroadcast>(mean, c), parameter<W, kBroadcast>(scale, c), parameter<W, kBroadcast>(bias, c)};
  }
  template <int W>
  FASTRES_HD void at(int64_t i, const Parameters<W>& p) const {
    Float<W> z = affine(load<W>(x + i), p.mean, p.scale, p.bias);
    if constexpr (kResidual) z += load<W>(residual + i);
    store<W>(y + i, activate(z, broadcast<W>(floor)));
  }
};

template <class T, bool kMask, bool kBatch, bool kStore>
struct BackwardMap {
  const T* dy;
  const T* y;
  const T* x;
  T* dx;
  T* dresidual;
  const float* mean;    // [C]
  const float* scale;   // [C]
  const float* mean_g;  // [C]
  const float* slope;   // [C]

  template <int W>
  struct Parameters {
    Float<W> mean, scale, mean_g, slope;
  };
  template <int W, bool kBroadcast>
  FASTRES_HD Parameters<W> parameters(int64_t c) const {
    const Float<W> s = parameter<W, kBroadcast>(scale, c);
    if constexpr (!kBatch) return {s, s, s, s};
    return {parameter<W, kBroadcast>(mean, c), s, parameter<W, kBroadcast>(mean_g, c),
            parameter<W, kBroadcast>(slope, c)};
  }
  template <int W>
  FASTRES_HD void at(int64_t i, const Parameters<W>& p) const {
    Float<W> g = load<W>(dy + i);
    if constexpr (kMask) g = relu_gradient(g, load<W>(y + i));
    if constexpr (kStore) store<W>(dresidual + i, g);
    if constexpr (kBatch) {
      store<W>(dx + i, input_gradient(g, load<W>(x + i), p.mean, p.scale, p.mean_g, p.slope));
    } else {
      store<W>(dx + i, g * p.scale);
    }
  }
};

template <int W, bool kBroadcast, class Map>
FASTRES_HD void map_run(const Map& map, int64_t i, int64_t n, int64_t c) {
  int64_t k = 0;
  if constexpr (kBroadcast) {
    const auto wide = map.template parameters<W, true>(c);
    const auto one = map.template parameters<1, true>(c);
    for (; k + W <= n; k += W) map.template at<W>(i + k, wide);
    for (; k < n; ++k) map.template at<1>(i + k, one);
  } else {
    for (; k + W <= n; k += W) map.template at<W>(i + k, map.template parameters<W, false>(c + k));
    for (; k < n; ++k) map.template at<1>(i + k, map.template parameters<1, false>(c + k));
  }
}

// ---- The step between the passes.

// Buffers of one call. Parameters are [C]; partial sums [chunks, C] are there for NHWC only.
struct Scratch {
  std::unique_ptr<double[]> memory;
  double *a, *b;                          // [chunks, C]
  float *scale, *bias, *mean_g, *slope;  // [C]

  Scratch(int64_t channels, int64_t chunks)
      : memory(new double[2 * (chunks + 1) * channels]), a(memory.get()), b(a + chunks * channels) {
    scale = reinterpret_cast<float*>(b + chunks * channels);
    bias = scale + channels;
    mean_g = bias + channels;
    slope = mean_g + channels;
  }
};

struct ForwardChannel {
  const float* weight;      // [C] or null
  const float* bias_input;  // [C] or null
  float *mean, *var;        // [C], written in training
  float *scale, *bias;      // [C]
  double eps;

  FASTRES_HD void statistics(int64_t c, const Moments& m) const {
    mean[c] = static_cast<float>(m.sum / m.count);
    var[c] = static_cast<float>(m.m2 / m.count);
  }
  FASTRES_HD void parameters(int64_t c) const {
    scale[c] = static_cast<float>((weight ? weight[c] : 1.f) / std::sqrt(var[c] + eps));
    bias[c] = bias_input ? bias_input[c] : 0.f;
  }
};

struct BackwardChannel {
  const float *weight, *var;             // [C]; weight or null
  float *dweight, *dbias;                // [C] or null
  float *scale, *mean_g, *slope;         // [C]
  double eps, count;

  // sum_g = sum g, sum_gx = sum g * (x - mean)
  FASTRES_HD void sums(int64_t c, double sum_g, double sum_gx) const {
    const double rstd = 1 / std::sqrt(var[c] + eps);
    if (dbias) dbias[c] = static_cast<float>(sum_g);
    if (dweight) dweight[c] = static_cast<float>(sum_gx * rstd);
    mean_g[c] = static_cast<float>(sum_g / count);
    slope[c] = static_cast<float>(sum_gx * rstd * rstd / count);
  }
  FASTRES_HD void parameters(int64_t c) const {
    scale[c] = static_cast<float>((weight ? weight[c] : 1.f) / std::sqrt(var[c] + eps));
  }
};

// ---- NHWC: x is [rows, C].

struct Partition {
  int64_t rows, channels, chunks, tiles, tile;

  Partition(int64_t rows, int64_t channels) : rows(rows), channels(channels) {
    tiles = (channels + kTile - 1) / kTile;
    tile = (channels + tiles - 1) / tiles;
    const int64_t chunk_rows = std::clamp<int64_t>(kChunkElements / tile, kMinRows, kMaxRows);
    chunks = std::max<int64_t>(1, rows / chunk_rows);
  }
  int64_t tasks() const { return chunks * tiles; }
  FASTRES_HD int64_t first_row(int64_t chunk) const {  // chunks differ by one row at most
    const int64_t base = rows / chunks, longer = rows % chunks;
    return chunk * base + (chunk < longer ? chunk : longer);
  }
};

template <class Term>
struct SumRows {
  Term term;
  Partition part;
  const float* centre;  // [C]: the mean; unused for statistics, which choose a shift per task
  double *a, *b;        // [chunks, C]: sums; for statistics, sum and m2

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / part.tiles, c = task % part.tiles * part.tile;
      const int64_t width = part.tile < part.channels - c ? part.tile : part.channels - c;
      sum_tile<W>(chunk, c, width);
    }
  }

  template <int W>
  FASTRES_HD void sum_tile(int64_t chunk, int64_t c, int64_t width) const {
    const int64_t first = part.first_row(chunk), last = part.first_row(chunk + 1);
    float shift[kTile], fa[kTile], fb[kTile];
    double sa[kTile], sb[kTile];
    const float* m = shift;
    if constexpr (Term::kStatistics) {
      if (last - first >= kShiftElements) {
        choose_shift<W, kShiftElements>(first * part.channels + c, width, shift);
      } else {
        choose_shift<W, 1>(first * part.channels + c, width, shift);
      }
    } else {
      m = centre + c;
    }
    for (int64_t j = 0; j < width; ++j) sa[j] = sb[j] = 0;

    for (int64_t row = first; row < last;) {
      const int64_t stop = row + kFlush < last ? row + kFlush : last;
      for (int64_t j = 0; j < width; ++j) fa[j] = fb[j] = 0;
      // Four rows at a time read and write the sums in L1 a quarter as often. Not with the gradients' four streams:
      // sixteen at once are more than the prefetcher follows (60 % slower at 256 channels of 56x56).
      if constexpr (Term::kStatistics) {
        for (; row + 4 <= stop; row += 4) add_rows<W, 4>(row * part.channels + c, width, m, fa, fb);
      }
      for (; row < stop; ++row) add_rows<W, 1>(row * part.channels + c, width, m, fa, fb);
      for (int64_t j = 0; j < width; ++j) {
        sa[j] += fa[j];
        sb[j] += fb[j];
      }
    }

    double* out_a = a + chunk * part.channels + c;
    double* out_b = b + chunk * part.channels + c;
    const double count = static_cast<double>(last - first);
    for (int64_t j = 0; j < width; ++j) {
      if constexpr (Term::kStatistics) {
        const Moments moments = Moments::shifted(count, shift[j], sa[j], sb[j]);
        out_a[j] = moments.sum;
        out_b[j] = moments.m2;
      } else {
        out_a[j] = sa[j];
        out_b[j] = sb[j];
      }
    }
  }

  template <int W, int R>
  FASTRES_HD void choose_shift(int64_t i, int64_t width, float* shift) const {
    int64_t j = 0;
    for (; j + W <= width; j += W) store<W>(shift + j, mean_of_rows<W, R>(i + j));
    for (; j < width; ++j) store<1>(shift + j, mean_of_rows<1, R>(i + j));
  }

  // By halves: exact for a constant, and for integers.
  template <int W, int R>
  FASTRES_HD Float<W> mean_of_rows(int64_t i) const {
    if constexpr (R == 1) {
      return load<W>(term.x + i);
    } else {
      return mean_of_rows<W, R / 2>(i) * 0.5f + mean_of_rows<W, R / 2>(i + R / 2 * part.channels) * 0.5f;
    }
  }

  template <int W, int R>
  FASTRES_HD void add_rows(int64_t i, int64_t width, const float* m, float* fa, float* fb) const {
    int64_t j = 0;
    for (; j + W <= width; j += W) add_column<W, R>(i + j, m + j, fa + j, fb + j);
    for (; j < width; ++j) add_column<1, R>(i + j, m + j, fa + j, fb + j);
  }

  template <int W, int R>
  FASTRES_HD void add_column(int64_t i, const float* m, float* fa, float* fb) const {
    const Float<W> centre = load<W>(m);
    Float<W> va = load<W>(fa), vb = load<W>(fb);
    for (int r = 0; r < R; ++r) term.template add<W>(i + r * part.channels, centre, va, vb);
    store<W>(fa, va);
    store<W>(fb, vb);
  }
};

template <class Map>
struct MapRows {
  Map map;
  Partition part;

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    for (int64_t task = end - 1; task >= begin; --task) {
      const int64_t chunk = task / part.tiles, c = task % part.tiles * part.tile;
      const int64_t width = part.tile < part.channels - c ? part.tile : part.channels - c;
      for (int64_t row = part.first_row(chunk), last = part.first_row(chunk + 1); row < last; ++row) {
        map_run<W, false>(map, row * part.channels + c, width, c);
      }
    }
  }
};

// Partial sums to parameters, a block of channels a task.
template <class Channel>
struct FinishRows {
  Channel channel;
  Partition part;
  const double *a, *b;  // [chunks, C]; null: there are no sums, the statistics are given

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t c = block * kChannelBlock;
      const int64_t width = kChannelBlock < part.channels - c ? kChannelBlock : part.channels - c;
      if (a) merge(c, width);
      for (int64_t j = 0; j < width; ++j) channel.parameters(c + j);
    }
  }

  FASTRES_HD void merge(int64_t c, int64_t width) const {
    double sa[kChannelBlock] = {}, sb[kChannelBlock] = {}, mean[kChannelBlock];
    for (int64_t chunk = 0; chunk < part.chunks; ++chunk) {
      const int64_t i = chunk * part.channels + c;
      for (int64_t j = 0; j < width; ++j) {
        sa[j] += a[i + j];
        sb[j] += b[i + j];
      }
    }
    if constexpr (std::is_same_v<Channel, ForwardChannel>) {
      // The squared deviations inside the chunks, sb, lack those of the chunks' means.
      const double count = static_cast<double>(part.rows);
      for (int64_t j = 0; j < width; ++j) mean[j] = sa[j] / count;
      for (int64_t chunk = 0; chunk < part.chunks; ++chunk) {
        const int64_t i = chunk * part.channels + c;
        const double n = static_cast<double>(part.first_row(chunk + 1) - part.first_row(chunk)), inverse_n = 1 / n;
        for (int64_t j = 0; j < width; ++j) {
          const double delta = a[i + j] - n * mean[j];
          sb[j] += delta * delta * inverse_n;
        }
      }
      for (int64_t j = 0; j < width; ++j) channel.statistics(c + j, {count, sa[j], sb[j]});
    } else {
      for (int64_t j = 0; j < width; ++j) channel.sums(c + j, sa[j], sb[j]);
    }
  }
};

// ---- NCHW: x is [N, C, HW].

struct Planes {
  int64_t batch, channels, size;
  FASTRES_HD int64_t offset(int64_t n, int64_t c) const { return (n * channels + c) * size; }
};

template <int W>
struct RunSums {
  Float<W> a[4], b[4];
  float tail_a, tail_b;

  template <class Term>
  FASTRES_HD void add(const Term& term, int64_t i, int64_t n, float centre) {
    const Float<W> wide = broadcast<W>(centre);
    int64_t k = 0;
    for (; k + 4 * W <= n; k += 4 * W) {
      term.template add<W>(i + k, wide, a[0], b[0]);
      term.template add<W>(i + k + W, wide, a[1], b[1]);
      term.template add<W>(i + k + 2 * W, wide, a[2], b[2]);
      term.template add<W>(i + k + 3 * W, wide, a[3], b[3]);
    }
    for (; k + W <= n; k += W) term.template add<W>(i + k, wide, a[0], b[0]);
    for (; k < n; ++k) term.template add<1>(i + k, centre, tail_a, tail_b);
  }
  FASTRES_HD double total_a() const { return static_cast<double>(sum_lanes<W>((a[0] + a[1]) + (a[2] + a[3])) + tail_a); }
  FASTRES_HD double total_b() const { return static_cast<double>(sum_lanes<W>((b[0] + b[1]) + (b[2] + b[3])) + tail_b); }
};

template <int W, class Term>
FASTRES_HD Moments channel_statistics(const Term& term, const Planes& planes, int64_t c) {
  int64_t n = kShiftElements;
  while (n > planes.size) n /= 2;
  double first = 0;
  for (int64_t k = 0; k < n; ++k) first += load<1>(term.x + planes.offset(0, c) + k);
  float centre = static_cast<float>(first / static_cast<double>(n));

  Moments total{0, 0, 0};
  RunSums<W> sums{};
  int64_t pending = 0, limit = kRun / 8;  // the first shift is a guess: leave it early
  for (int64_t image = 0; image < planes.batch; ++image) {
    for (int64_t k = 0; k < planes.size;) {
      const int64_t run = limit < planes.size - k ? limit : planes.size - k;
      sums.add(term, planes.offset(image, c) + k, run, centre);
      k += run;
      pending += run;
      if (pending >= limit || (image == planes.batch - 1 && k == planes.size)) {
        const Moments block =
            Moments::shifted(static_cast<double>(pending), centre, sums.total_a(), sums.total_b());
        if (total.count == 0) {
          total = block;
        } else {
          total.merge(block);
        }
        centre = static_cast<float>(total.sum / total.count);
        sums = RunSums<W>{};
        pending = 0;
        limit = kRun;
      }
    }
  }
  return total;
}

template <int W, class Term>
FASTRES_HD void channel_sums(const Term& term, const Planes& planes, int64_t c, float centre, double& a, double& b) {
  RunSums<W> sums{};
  int64_t pending = 0;
  a = b = 0;
  for (int64_t image = 0; image < planes.batch; ++image) {
    for (int64_t k = 0; k < planes.size;) {
      const int64_t run = kRun < planes.size - k ? kRun : planes.size - k;
      sums.add(term, planes.offset(image, c) + k, run, centre);
      k += run;
      pending += run;
      if (pending >= kRun || (image == planes.batch - 1 && k == planes.size)) {
        a += sums.total_a();
        b += sums.total_b();
        sums = RunSums<W>{};
        pending = 0;
      }
    }
  }
}

struct Nothing {};  // stands for a pass that is not wanted

template <class Term, class Map, class Channel>
struct Channels {
  Term term;
  Map map;
  Channel channel;
  Planes planes;
  const float* mean;  // [C], read by the gradients' sums

  template <int W>
  FASTRES_HD void run(int64_t begin, int64_t end) const {
    for (int64_t c = begin; c < end; ++c) {
      if constexpr (std::is_same_v<Term, Nothing>) {
      } else if constexpr (Term::kStatistics) {
        channel.statistics(c, channel_statistics<W>(term, planes, c));
      } else {
        double a, b;
        channel_sums<W>(term, planes, c, mean[c], a, b);
        channel.sums(c, a, b);
      }
      channel.parameters(c);
      if constexpr (!std::is_same_v<Map, Nothing>) {
        for (int64_t n = planes.batch - 1; n >= 0; --n) map_run<W, true>(map, planes.offset(n, c), planes.size, c);
      }
    }
  }
};

// ---- Launchers.

template <class Kernel>
void launch(const Kernel& kernel, int64_t tasks, int64_t elements) {
  parallel_tasks(tasks, elements, [&](int64_t begin, int64_t end) { run_kernel(kernel, begin, end); });
}

// [N, C, H, W] as rows or as planes. Where both would do, the one whose inner loop is long.
struct Shape {
  int64_t numel, channels, batch, plane;
  bool rows;

  Shape(const Tensor& x, bool channels_last) : numel(x.numel()), channels(x.size(1)), batch(x.size(0)) {
    STD_TORCH_CHECK(numel > 0, "x: expected at least one element, got shape ", shape_string(x));
    plane = numel / (batch * channels);
    rows = channels_last ? channels > 1 : plane == 1;
    if (channels_last && channels == 1) {
      plane = numel;
      batch = 1;
    }
  }
  Partition partition() const { return Partition(numel / channels, channels); }
  Planes planes() const { return {batch, channels, plane}; }
  int64_t chunks() const { return rows ? partition().chunks : 0; }
  int64_t channel_blocks() const { return (channels + kChannelBlock - 1) / kChannelBlock; }
};

template <class Term, class Map, class Channel>
void passes(const Shape& shape, const Scratch& scratch, const Term& term, const Map& map, const Channel& channel,
            const float* mean) {
  if (!shape.rows) {
    launch(Channels<Term, Map, Channel>{term, map, channel, shape.planes(), mean}, shape.channels, shape.numel);
    return;
  }
  const Partition part = shape.partition();
  constexpr bool kSums = !std::is_same_v<Term, Nothing>;
  if constexpr (kSums) {
    launch(SumRows<Term>{term, part, mean, scratch.a, scratch.b}, part.tasks(), shape.numel);
  }
  launch(FinishRows<Channel>{channel, part, kSums ? scratch.a : nullptr, scratch.b}, shape.channel_blocks(),
         (kSums ? part.chunks : 1) * shape.channels);
  if constexpr (!std::is_same_v<Map, Nothing>) launch(MapRows<Map>{map, part}, part.tasks(), shape.numel);
}

void bn_act(Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual, Tensor y, Tensor mean,
            Tensor var, bool channels_last, bool training, double eps, std::string act) {
  check_cpu(x, "x");
  check_layout(x, "x", channels_last);
  const Shape shape(x, channels_last);
  const auto check_activation = [&](const Tensor& t, const char* name) {
    check_same(t, name, x, "x");
    check_layout(t, name, channels_last);
  };
  if (residual) check_activation(*residual, "residual");
  check_activation(y, "y");
  if (weight) check_channels(*weight, "weight", shape.channels);
  if (bias) check_channels(*bias, "bias", shape.channels);
  check_channels(mean, "mean", shape.channels);
  check_channels(var, "var", shape.channels);
  const float floor = is_relu(act) ? 0.f : -std::numeric_limits<float>::infinity();

  const Scratch scratch(shape.channels, training ? shape.chunks() : 0);
  const ForwardChannel channel{input<float>(weight), input<float>(bias), output<float>(mean), output<float>(var),
                               scratch.scale,        scratch.bias,       eps};
  dispatch_dtype(x, "x", [&](auto t) {
    using T = decltype(t);
    const StatisticsTerm<T> term{input<T>(x)};
    with_bool(residual.has_value(), [&](auto has_residual) {
      const ForwardMap<T, has_residual.value> map{input<T>(x),   input<T>(residual), output<T>(y), channel.mean,
                                                  scratch.scale, scratch.bias,       floor};
      if (training) {
        passes(shape, scratch, term, map, channel, nullptr);
      } else {
        passes(shape, scratch, Nothing{}, map, channel, nullptr);
      }
    });
  });
}

void bn_act_backward(Tensor dy, Tensor x, OptionalTensor y, OptionalTensor weight, Tensor mean, Tensor var,
                     OptionalTensor dx, OptionalTensor dweight, OptionalTensor dbias, OptionalTensor dresidual,
                     bool channels_last, bool training, double eps, std::string act) {
  check_cpu(dy, "dy");
  check_layout(dy, "dy", channels_last);
  const Shape shape(dy, channels_last);
  const auto check_activation = [&](const OptionalTensor& t, const char* name) {
    if (!t) return;
    check_same(*t, name, dy, "dy");
    check_layout(*t, name, channels_last);
  };
  check_activation(x, "x");
  check_activation(y, "y");
  check_activation(dx, "dx");
  check_activation(dresidual, "dresidual");
  const auto check_parameter = [&](const OptionalTensor& t, const char* name) {
    if (t) check_channels(*t, name, shape.channels);
  };
  check_parameter(weight, "weight");
  check_parameter(mean, "mean");
  check_parameter(var, "var");
  check_parameter(dweight, "dweight");
  check_parameter(dbias, "dbias");
  const bool mask = is_relu(act);
  STD_TORCH_CHECK(!mask || y, "y: act=\"relu\" takes its mask from the output of the forward, got None");
  if (!dx && !dweight && !dbias && !dresidual) return;

  // dresidual alone goes with the sums, which write it on their way.
  const bool sums = dweight || dbias || (training && dx) || !dx;
  const Scratch scratch(shape.channels, sums ? shape.chunks() : 0);
  const float* mean_in = input<float>(mean);
  const BackwardChannel channel{input<float>(weight), input<float>(var), output<float>(dweight), output<float>(dbias),
                                scratch.scale,        scratch.mean_g,    scratch.slope,          eps,
                                static_cast<double>(shape.numel / shape.channels)};

  dispatch_dtype(dy, "dy", [&](auto t) {
    using T = decltype(t);
    const T *dy_in = input<T>(dy), *y_in = input<T>(y), *x_in = input<T>(x);
    T *dx_out = output<T>(dx), *dresidual_out = output<T>(dresidual);
    // What a map reads as dy, and whether it still has to mask: after the sums have stored g, it reads g.
    const auto map = [&](auto masked, auto batch, auto store_g, const T* g) {
      return BackwardMap<T, masked.value, batch.value, store_g.value>{
          g, y_in, x_in, dx_out, dresidual_out, mean_in, scratch.scale, scratch.mean_g, scratch.slope};
    };
    constexpr std::true_type yes;
    constexpr std::false_type no;
    with_bool(mask, [&](auto masked) {
      with_bool(dresidual.has_value(), [&](auto store_g) {
        const GradientTerm<T, masked.value, store_g.value> term{dy_in, y_in, x_in, dresidual_out};
        constexpr std::bool_constant<masked.value && !store_g.value> still_masked;
        const T* g = store_g.value ? dresidual_out : dy_in;
        if (training && dx) {
          passes(shape, scratch, term, map(still_masked, yes, no, g), channel, mean_in);
        } else if (sums) {
          passes(shape, scratch, term, Nothing{}, channel, mean_in);
          if (dx) passes(shape, scratch, Nothing{}, map(still_masked, no, no, g), channel, nullptr);
        } else {
          passes(shape, scratch, Nothing{}, map(masked, no, store_g, dy_in), channel, nullptr);
        }
      });
    });
  });
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("_bn_act_native", TORCH_BOX(&fastres::bn_act));
  m.impl("_bn_act_backward_native", TORCH_BOX(&fastres::bn_act_backward));
}
