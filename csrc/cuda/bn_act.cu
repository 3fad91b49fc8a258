// bn_act on a GPU: y = act((x - mean) * rstd * weight + bias [+ residual]), batch or running statistics; formulas in
// element.h, kernels in bn_act_forward.cu and bn_act_backward.cu, how they cut a tensor up in launch.h.
//
//   training  statistics, merge, y          x twice, y once                  eval  y             x, y
//             sums, merge, dx               dy, y, x twice, dx once                sums + dx     dy, y, x, dx
//
// Scratch memory is torch's: a launch neither waits nor allocates behind torch's back, so that a graph can capture it.
#include "cuda/bn_act.h"

#include <tuple>

#include "cuda/tensors.h"

namespace fastres {
namespace {

View view_of(const Tensor& x, bool channels_last) {
  const auto size = x.sizes();
  return View::of(size[0], size[1], size[2] * size[3], channels_last);
}

Tensor scratch_of(int64_t floats, const Tensor& like) { return empty_channels(floats, like); }

void forward(Forward f, const Statistics* statistics, const Tensor& x, const Stream& on) {
  if (statistics) {
    const Tensor scratch = scratch_of(statistics_scratch(f, on), x);
    bn_statistics(f, *statistics, output<float>(scratch), on);
  }
  bn_act_apply(f, on);
}

void backward(const Backward& b, const Tensor& x, const Stream& on) {
  if (!b.needs_sums()) return bn_act_gradients(b, nullptr, on);
  const Tensor scratch = scratch_of(sums_scratch(b, on), x);
  bn_act_gradients(b, output<float>(scratch), on);
}

// As in csrc/cpu/bn_act.cpp; the running statistics move in the launch that merges those of the batch. `overwrite` takes
// parameters in fp32, and statistics.
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> bn_act(
    Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual, OptionalTensor running_mean,
    OptionalTensor running_var, OptionalTensor num_batches_tracked, bool training, double momentum, double eps,
    bool relu, bool overwrite) {
  const auto channels_last = channels_last_of(x);
  if (!channels_last || !x.is_cuda() || !has_kernel_dtype(x) || !looks_like(residual, x)) return {};
  const int64_t channels = x.size(1);
  for (const OptionalTensor* t : {&weight, &bias, &running_mean, &running_var}) {
    if (!is_per_channel(*t, channels, x)) return {};
  }
  if (!is_counter(num_batches_tracked, x)) return {};
  const View view = view_of(x, *channels_last);
  if (training ? overwrite || view.per_channel() == 1 : !(running_mean && running_var)) return {};

  const OnDevice on(x);
  const Tensor y = overwrite ? x : empty_as(x);
  Forward f{type_of(x, "x"), view, data(x), data(residual), data(y), input<float>(weight), input<float>(bias),
            input<float>(running_mean), input<float>(running_var), nullptr, nullptr, static_cast<float>(eps), relu};
  if (overwrite) {
    forward(f, nullptr, x, on.stream());
    return {y, std::nullopt, std::nullopt};
  }
  const Tensor mean = empty_channels(channels, x), var = empty_channels(channels, x);
  float *m = output<float>(mean), *v = output<float>(var);
  if (training) {
    f.mean = m;
    f.var = v;
  } else {  // copies: backward uses the statistics of this forward, whatever happens to the buffers in between
    f.mean_copy = m;
    f.var_copy = v;
  }
  const Statistics statistics{m, v, output<float>(running_mean), output<float>(running_var),
                              output<int64_t>(num_batches_tracked), static_cast<float>(momentum)};
  forward(f, training ? &statistics : nullptr, x, on.stream());
  return {y, mean, var};
}

// `needs`: one bit each for dx, dweight, dbias, dresidual. A ReLU's sign comes from y alone, and dy is left as it is:
// torch's caching allocator hands out memory for less than a second buffer's page faults cost a CPU.
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor> bn_act_backward(
    Tensor dy, Tensor x, OptionalTensor y, OptionalTensor weight, OptionalTensor /*bias*/, Tensor mean, Tensor var,
    bool training, double eps, bool relu, int64_t needs, bool /*reuse_dy*/) {
  const auto channels_last = channels_last_of(x);
  if (!channels_last || !x.is_cuda() || !has_kernel_dtype(x) || !looks_like(dy, x) || !looks_like(y, x) ||
      (relu && !y)) {
    return {};
  }
  const int64_t channels = x.size(1);
  for (const OptionalTensor& t : {weight, OptionalTensor(mean), OptionalTensor(var)}) {
    if (!is_per_channel(t, channels, x)) return {};
  }
  const OnDevice on(x);
  const auto wanted = [&](int bit, auto make) { return needs >> bit & 1 ? OptionalTensor(make()) : OptionalTensor(); };
  const auto activation = [&] { return empty_as(x); };
  const auto per_channel = [&] { return empty_channels(channels, x); };
  const OptionalTensor dx = wanted(0, activation), dweight = wanted(1, per_channel), dbias = wanted(2, per_channel),
                       dresidual = wanted(3, activation);
  backward({type_of(x, "x"), view_of(x, *channels_last), data(dy), data(x), relu ? data(y) : nullptr,
            input<float>(weight), input<float>(mean), input<float>(var), data(dx), data(dresidual),
            output<float>(dweight), output<float>(dbias), static_cast<float>(eps), training},
           x, on.stream());
  return {dx, dweight, dbias, dresidual};
}

}  // namespace
}  // namespace fastres

STABLE_TORCH_LIBRARY_IMPL(fastres, CUDA, m) {
  m.impl("_bn_act_native", TORCH_BOX(&fastres::bn_act));
  m.impl("_bn_act_backward_native", TORCH_BOX(&fastres::bn_act_backward));
}
