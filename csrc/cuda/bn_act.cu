// bn_act on a GPU: y = act((x - mean) * rstd * weight + bias [+ residual]), batch or running statistics; formulas in
// element.h, kernels in bn_act_forward.cu and bn_act_backward.cu, how they cut a tensor up in launch.h.
//
//   training  statistics, merge, y          x twice, y once                  eval  y             x, y
//             sums, merge, dx               dy, y, x twice, dx once                sums + dx     dy, y, x, dx
//
// Scratch memory is torch's: a launch neither waits nor allocates behind torch's back, so that a graph can capture it.
#include "cuda/bn_act.h"

#include <string>
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

// ---- Filling what the caller allocated: any call, checked.

void bn_act(Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual, Tensor y, Tensor mean,
            Tensor var, bool channels_last, bool training, double eps, std::string act) {
  check_cuda_tensor(x, "x");
  check_layout(x, "x", channels_last);
  const int64_t channels = x.size(1);
  const auto check_activation = [&](const Tensor& t, const char* name) {
    check_same(t, name, x, "x");
    check_layout(t, name, channels_last);
  };
  if (residual) check_activation(*residual, "residual");
  check_activation(y, "y");
  if (weight) check_channels(*weight, "weight", channels, x, "x");
  if (bias) check_channels(*bias, "bias", channels, x, "x");
  check_channels(mean, "mean", channels, x, "x");
  check_channels(var, "var", channels, x, "x");
  STD_TORCH_CHECK(x.numel() > 0, "x: expected at least one element, got shape ", shape_string(x));
  const bool relu = is_relu(act);

  const OnDevice on(x);
  float *m = output<float>(mean), *v = output<float>(var);
  const Statistics statistics{m, v, nullptr, nullptr, nullptr, 0};
  forward({type_of(x, "x"), view_of(x, channels_last), data(x), data(residual), data(y), input<float>(weight),
           input<float>(bias), m, v, nullptr, nullptr, static_cast<float>(eps), relu},
          training ? &statistics : nullptr, x, on.stream());
}

void bn_act_backward(Tensor dy, Tensor x, OptionalTensor y, OptionalTensor weight, Tensor mean, Tensor var,
                     OptionalTensor dx, OptionalTensor dweight, OptionalTensor dbias, OptionalTensor dresidual,
                     bool channels_last, bool training, double eps, std::string act) {
  check_cuda_tensor(dy, "dy");
  check_layout(dy, "dy", channels_last);
  const int64_t channels = dy.size(1);
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
    if (t) check_channels(*t, name, channels, dy, "dy");
  };
  check_parameter(weight, "weight");
  check_parameter(mean, "mean");
  check_parameter(var, "var");
  check_parameter(dweight, "dweight");
  check_parameter(dbias, "dbias");
  STD_TORCH_CHECK(dy.numel() > 0, "dy: expected at least one element, got shape ", shape_string(dy));
  const bool mask = is_relu(act);
  STD_TORCH_CHECK(!mask || y, "y: act=\"relu\" takes its mask from the output of the forward, got None");
  if (!dx && !dweight && !dbias && !dresidual) return;

  const OnDevice on(dy);
  backward({type_of(dy, "dy"), view_of(dy, channels_last), data(dy), data(x), mask ? data(y) : nullptr,
            input<float>(weight), input<float>(mean), input<float>(var), data(dx), data(dresidual),
            output<float>(dweight), output<float>(dbias), static_cast<float>(eps), training},
           dy, on.stream());
}

// ---- The whole call, as in csrc/cpu/bn_act.cpp: allocates, computes, and moves the running statistics in the launch
// that merges them. Nothing is returned, and nothing has happened, where the call is left to the general way.

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> bn_act_direct(
    Tensor x, OptionalTensor weight, OptionalTensor bias, OptionalTensor residual, OptionalTensor running_mean,
    OptionalTensor running_var, OptionalTensor num_batches_tracked, bool training, double momentum, double eps,
    bool relu) {
  const auto channels_last = plainly_channels_last(x);
  if (!channels_last || !x.is_cuda() || !has_kernel_dtype(x) || !looks_like(residual, x)) return {};
  const int64_t channels = x.size(1);
  for (const OptionalTensor* t : {&weight, &bias, &running_mean, &running_var}) {
    if (!is_per_channel(*t, channels, x)) return {};
  }
  if (!is_counter(num_batches_tracked, x)) return {};
  const View view = view_of(x, *channels_last);
  if (training ? view.per_channel() == 1 : !(running_mean && running_var)) return {};

  const OnDevice on(x);
  const Tensor y = empty_as(x), mean = empty_channels(channels, x), var = empty_channels(channels, x);
  float *m = output<float>(mean), *v = output<float>(var);
  Forward f{type_of(x, "x"), view, data(x), data(residual), data(y), input<float>(weight), input<float>(bias),
            m, v, nullptr, nullptr, static_cast<float>(eps), relu};
  if (!training) {  // copies: backward uses the statistics of this forward, whatever happens to the buffers in between
    f.mean = input<float>(running_mean);
    f.var = input<float>(running_var);
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
std::tuple<OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor> bn_act_backward_direct(
    Tensor dy, Tensor x, OptionalTensor y, OptionalTensor weight, OptionalTensor /*bias*/, Tensor mean, Tensor var,
    bool training, double eps, bool relu, int64_t needs, bool /*reuse_dy*/) {
  const auto channels_last = plainly_channels_last(x);
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
  m.impl("_bn_act_direct_native", TORCH_BOX(&fastres::bn_act_direct));
  m.impl("_bn_act_backward_direct_native", TORCH_BOX(&fastres::bn_act_backward_direct));
}
