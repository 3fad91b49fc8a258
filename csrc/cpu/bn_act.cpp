// bn_act: y = act((x - mean) * rstd * weight + bias [+ residual]), batch or running statistics; formulas in element.h.
//
// Both directions are two passes: sums per channel, then a map over the elements. Bytes are the bound, so the second
// pass should find its inputs in cache (bn_act_rows.h for NHWC, bn_act_planes.h for NCHW). The partition and the order
// of every sum follow from the shape alone: results do not depend on the number of threads.
//
//   forward   reads x, then x and residual, writes y
//   backward  reads dy, y and x, writes dresidual, which is g; then reads g and x, writes dx.
//             Where there was no residual, y is not read, its sign is computed from x again: dy and x, twice
//             What is written first may be written over dy (`reuse_dy`)
//
// Sums: fp32 over at most some thousand elements, then fp64. Variance: squared deviations from a shift taken inside the
// same task. A shift that is the mean of k of n values multiplies the rounding error by at most 1 + n / k, whatever the
// data.
// With -O2 alone gcc fuses products and sums in one pass and not in another: a ReLU's sign computed again may differ.
#pragma GCC optimize("O3")

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/bn_act_planes.h"
#include "cpu/bn_act_rows.h"
#include "tensor.h"

namespace fastres {
namespace {

// The buffers of a call. Parameters are [C]; partial sums [chunks, C] are there for NHWC only.
struct Scratch {
  static constexpr uintptr_t kLine = 64 / sizeof(double);  // of the cache
  std::unique_ptr<double[]> memory;
  double *a, *b;                          // [chunks, C]
  float *scale, *bias, *mean_g, *slope;   // [C]

  Scratch(int64_t channels, int64_t chunks) : memory(new double[2 * (chunks + 1) * channels + kLine]) {
    const auto address = reinterpret_cast<uintptr_t>(memory.get()) / sizeof(double);
    a = memory.get() + (kLine - address % kLine) % kLine;  // a vector that lies in two cache lines costs two loads
    b = a + chunks * channels;
    scale = reinterpret_cast<float*>(b + chunks * channels);
    bias = scale + channels;
    mean_g = bias + channels;
    slope = mean_g + channels;
  }
};

template <class Kernel>
void launch(const Kernel& kernel, int64_t tasks, int64_t elements) {
  parallel_tasks(tasks, elements, [&](int64_t begin, int64_t end) { run_kernel(kernel, begin, end); });
}

// [N, C, H, W] as rows or as planes. Where both would do, the one whose inner loop is long.
struct Shape {
  int64_t numel, channels, batch, plane;
  bool rows, cached;

  Shape(const Tensor& x, bool channels_last) : numel(x.numel()), channels(x.size(1)), batch(x.size(0)) {
    plane = numel / (batch * channels);
    cached = is_cached(numel * (x.scalar_type() == ScalarType::Float ? 4 : 2));
    rows = channels_last ? channels > 1 : plane == 1;
    if (channels_last && channels == 1) {
      plane = numel;
      batch = 1;
    }
  }
  int64_t chunks() const { return rows ? Partition(numel / channels, channels).chunks : 0; }
  int64_t channel_blocks() const { return (channels + kChannelBlock - 1) / kChannelBlock; }
};

struct Wanted {
  bool sums, map;
};

template <class Term, class Map, class Channel>
void passes(const Shape& shape, const Scratch& scratch, Wanted wanted, const Term& term, const Map& map,
            const Channel& channel, const float* mean) {
  if (!shape.rows) {
    const Planes planes(shape.batch, shape.channels, shape.plane);
    launch(GroupPasses<Term, Map, Channel>{term, map, channel, planes, mean, wanted.sums, wanted.map}, planes.tasks(),
           shape.numel);
    return;
  }
  const Partition part(shape.numel / shape.channels, shape.channels);
  const auto finish = [&](bool sums, bool parameters) {
    launch(FinishRows<Channel>{channel, part, sums ? scratch.a : nullptr, scratch.b, parameters},
           shape.channel_blocks(), (sums ? part.chunks : 1) * shape.channels);
  };
  const bool early = wanted.sums && Term::kNeedsParameters;
  if (early) finish(false, true);
  if (wanted.sums) launch(SumRows<Term>{term, part, mean, scratch.a, scratch.b}, part.tasks(), shape.numel);
  finish(wanted.sums, !early);
  if (wanted.map) launch(MapRows<Map>{map, part, shape.cached}, part.tasks(), shape.numel);
}

// [C] in fp32: the tensor's own memory, or a copy of what is stored in 16 bits. Null where there is no tensor.
class PerChannel {
 public:
  explicit PerChannel(const OptionalTensor& t) {
    if (t && t->scalar_type() == ScalarType::Float) data_ = input<float>(*t);
    if (!t || data_) return;
    dispatch_dtype(*t, "parameter", [&](auto element) {
      const auto* from = input<decltype(element)>(*t);
      copy_.resize(static_cast<size_t>(t->numel()));
      for (size_t c = 0; c < copy_.size(); ++c) copy_[c] = load<1>(from + c);
    });
    data_ = copy_.data();
  }
  const float* data() const { return data_; }

 private:
  std::vector<float> copy_;
  const float* data_ = nullptr;
};

// mean, var: written in training, else read; null: 0 and 1 - eps.
void forward(const Shape& shape, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
             const OptionalTensor& residual, const Tensor& y, float* mean, float* var, bool training, double eps,
             bool relu) {
  const float floor = relu ? 0.f : -std::numeric_limits<float>::infinity();
  const Scratch scratch(shape.channels, training ? shape.chunks() : 0);
  if (!mean) {
    mean = scratch.mean_g;
    var = scratch.slope;
    std::fill_n(mean, shape.channels, 0.f);
    std::fill_n(var, shape.channels, 1.f);
    eps = 0;
  }
  const PerChannel weights(weight), biases(bias);
  const ForwardChannel channel{weights.data(), biases.data(), mean, var, scratch.scale, scratch.bias, eps};
  dispatch_dtype(x, "x", [&](auto t) {
    using T = decltype(t);
    const StatisticsTerm<T> term{input<T>(x)};
    with_bool(residual.has_value(), [&](auto has_residual) {
      const ForwardMap<T, has_residual.value> map{input<T>(x),   input<T>(residual), output<T>(y), channel.mean,
                                                  scratch.scale, scratch.bias,       floor};
      passes(shape, scratch, {training, true}, term, map, channel, nullptr);
    });
  });
}

template <class F>
void with_mask(Mask mask, const F& f) {
  switch (mask) {
    case Mask::kNone:
      return f(std::integral_constant<Mask, Mask::kNone>{});
    case Mask::kOutput:
      return f(std::integral_constant<Mask, Mask::kOutput>{});
    case Mask::kInput:
      return f(std::integral_constant<Mask, Mask::kInput>{});
  }
}

void backward(const Shape& shape, const Tensor& dy, const Tensor& x, const OptionalTensor& y,
              const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
              const OptionalTensor& dx, const OptionalTensor& dweight, const OptionalTensor& dbias,
              const OptionalTensor& dresidual, bool training, double eps, Mask mask) {
  const bool eval_map = dx && !training;  // needs no sums; otherwise the sums write dresidual on their way
  const bool sums = dweight || dbias || !eval_map;
  const Scratch scratch(shape.channels, sums ? shape.chunks() : 0);
  const float* mean_in = input<float>(mean);
  const BackwardChannel channel{input<float>(weight),
                                input<float>(var),
                                input<float>(bias),
                                output<float>(dweight),
                                output<float>(dbias),
                                scratch.scale,
                                scratch.bias,
                                scratch.mean_g,
                                scratch.slope,
                                eps,
                                static_cast<double>(shape.numel / shape.channels)};

  dispatch_dtype(dy, "dy", [&](auto t) {
    using T = decltype(t);
    const T *dy_in = input<T>(dy), *y_in = input<T>(y), *x_in = input<T>(x);
    T *dx_out = output<T>(dx), *dresidual_out = output<T>(dresidual);
    with_mask(mask, [&](auto masked) {
      with_bool(dresidual.has_value(), [&](auto store_g) {
        constexpr Mask kMask = masked.value;
        constexpr bool kStore = store_g.value;
        if (eval_map) {
          const GradientTerm<T, kMask, false> term{dy_in, y_in, x_in, nullptr, scratch.scale, scratch.bias};
          const BackwardMap<T, kMask, false, kStore> map{dy_in,          y_in,          x_in,
                                                         dx_out,         dresidual_out, mean_in,
                                                         scratch.scale,  scratch.mean_g, scratch.slope,
                                                         scratch.bias};
          passes(shape, scratch, {sums, true}, term, map, channel, mean_in);
        } else {
          const GradientTerm<T, kMask, kStore> term{dy_in, y_in, x_in, dresidual_out, scratch.scale, scratch.bias};
          const T* g = kStore ? dresidual_out : dy_in;
          const BackwardMap<T, kStore ? Mask::kNone : kMask, true, false> map{
              g, y_in, x_in, dx_out, nullptr, mean_in, scratch.scale, scratch.mean_g, scratch.slope, scratch.bias};
          passes(shape, scratch, {true, dx.has_value()}, term, map, channel, mean_in);
        }
      });
    });
  });
}

// running = (1 - momentum) * running + momentum * value * correction
void move(const OptionalTensor& running, const Tensor& value, double momentum, double correction) {
  if (!running) return;
  float* r = output<float>(running);
  const float* v = input<float>(value);
  for (int64_t c = 0; c < running->numel(); ++c) {
    r[c] = static_cast<float>((1 - momentum) * r[c] + momentum * correction * v[c]);
  }
}

// Returns y, and the mean and var that backward needs; moves the running statistics in training. `overwrite`, for calls
// without a gradient in eval mode: y is x, written over, and nothing is kept. Parameters and statistics may then be 16-bit
// numbers, and without statistics it is y = act(weight * x + bias [+ residual]).
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> bn_act(
    Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual, OptionalTensor running_mean,
    OptionalTensor running_var, OptionalTensor num_batches_tracked, bool training, double momentum, double eps,
    bool relu, bool overwrite) {
  const auto channels_last = channels_last_of(x);
  if (!channels_last || !x.is_cpu() || !has_kernel_dtype(x) || !looks_like(residual, x)) return {};
  const Shape shape(x, *channels_last);
  for (const OptionalTensor* t : {&weight, &bias, &running_mean, &running_var}) {
    if (!is_per_channel(*t, shape.channels, x, overwrite)) return {};
  }
  if (!is_counter(num_batches_tracked, x)) return {};
  const int64_t count = shape.numel / shape.channels;
  const bool has_statistics = running_mean && running_var, has_none = !running_mean && !running_var;
  if (training ? overwrite || count == 1 : !(has_statistics || (overwrite && has_none))) return {};

  if (overwrite) {
    const PerChannel mean(running_mean), var(running_var);
    forward(shape, x, weight, bias, residual, x, const_cast<float*>(mean.data()), const_cast<float*>(var.data()), false,
            eps, relu);
    return {x, std::nullopt, std::nullopt};
  }
  const Tensor y = empty_as(x), mean = empty_channels(shape.channels, x), var = empty_channels(shape.channels, x);
  if (!training) {  // copies: backward uses the statistics of this forward, whatever happens to the buffers in between
    std::copy_n(input<float>(running_mean), shape.channels, output<float>(mean));
    std::copy_n(input<float>(running_var), shape.channels, output<float>(var));
  }
  forward(shape, x, weight, bias, residual, y, output<float>(mean), output<float>(var), training, eps, relu);
  if (training) {
    move(running_mean, mean, momentum, 1);
    move(running_var, var, momentum, static_cast<double>(count) / static_cast<double>(count - 1));
    if (num_batches_tracked) ++*output<int64_t>(num_batches_tracked);
  }
  return {y, mean, var};
}

// `needs`: one bit each for dx, dweight, dbias, dresidual. `relu` without y: there was no residual, and the sign comes
// from x. `reuse_dy`: nobody else holds dy, a gradient may be returned in its memory.
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor> bn_act_backward(
    Tensor dy, Tensor x, OptionalTensor y, OptionalTensor weight, OptionalTensor bias, Tensor mean, Tensor var,
    bool training, double eps, bool relu, int64_t needs, bool reuse_dy) {
  const auto channels_last = channels_last_of(x);
  if (!channels_last || !x.is_cpu() || !has_kernel_dtype(x) || !looks_like(dy, x) || !looks_like(y, x)) return {};
  const Shape shape(x, *channels_last);
  for (const OptionalTensor& t : {weight, bias, OptionalTensor(mean), OptionalTensor(var)}) {
    if (!is_per_channel(t, shape.channels, x)) return {};
  }
  const auto wanted = [&](int bit, auto make) { return needs >> bit & 1 ? OptionalTensor(make()) : OptionalTensor(); };
  const auto activation = [&] {
    if (!reuse_dy) return empty_as(x);
    reuse_dy = false;
    return dy;
  };
  const auto per_channel = [&] { return empty_channels(shape.channels, x); };
  const OptionalTensor dresidual = wanted(3, activation);  // written before dx, and dx from it
  const OptionalTensor dx = wanted(0, activation), dweight = wanted(1, per_channel), dbias = wanted(2, per_channel);
  backward(shape, dy, x, y, weight, bias, mean, var, dx, dweight, dbias, dresidual, training, eps,
           !relu ? Mask::kNone : y ? Mask::kOutput : Mask::kInput);
  return {dx, dweight, dbias, dresidual};
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("_bn_act_native", TORCH_BOX(&fastres::bn_act));
  m.impl("_bn_act_backward_native", TORCH_BOX(&fastres::bn_act_backward));
}
