// The kernels of conv_act that this build has, and what each of them asks of a convolution.
#include "cuda/conv_act.h"

#include <algorithm>

namespace fastres {

std::string ConvTile::label() const {
  const char* element = type == Type::kFloat ? "float" : type == Type::kHalf ? "half" : "bfloat16";
  return std::string("conv_act<") + element + ", " + name + ">";
}

std::string conv_refusal(const ConvShape& shape, int64_t size) {
  const int64_t vector = kVectorBytes / size;
  const auto channels = [&](const char* what, int64_t count) {
    return std::string(what) + " has " + std::to_string(count) + " channels: must be a multiple of " +
           std::to_string(vector) + ", 16 bytes";
  };
  if (shape.c % vector != 0) return channels("x", shape.c);
  if (shape.k % vector != 0) return channels("y", shape.k);
  if (std::min({shape.n, shape.h, shape.w, shape.c, shape.k, shape.r, shape.s, shape.p, shape.q}) < 1) {
    return "a tensor without elements";
  }
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;
  const int64_t most = std::max({shape.stride[0], shape.stride[1], shape.padding[0], shape.padding[1],
                                 shape.dilation[0], shape.dilation[1]});
  if (most > kMost) return "stride, padding or dilation of " + std::to_string(most) + ": must be below 2^31";
  const int64_t x_pixels = shape.n * shape.h * shape.w, depth = shape.c * shape.r * shape.s;
  if (std::max({shape.pixels(), x_pixels, shape.k, depth}) > kMost) {
    return "a matrix of " + std::to_string(shape.pixels()) + " by " + std::to_string(shape.k) + " by " +
           std::to_string(depth) + ", from " + std::to_string(x_pixels) + " pixels of x: every side must be below 2^31";
  }
  return "";
}

const std::vector<ConvTile>& conv_tiles() {
  static const std::vector<ConvTile> tiles = [] {
    std::vector<ConvTile> found;
#if defined(FASTRES_CONV_SM90)
    list_conv_sm90_128x256(found);
    list_conv_sm90_256x128(found);
    list_conv_sm90_128x128(found);
    list_conv_sm90_128x64(found);
    list_conv_sm90_64x128(found);
    list_conv_sm90_streamk(found);
#endif
#if defined(FASTRES_CONV_SM80)
    list_conv_sm80_128x128(found);
    list_conv_sm80_64x64(found);
#endif
    return found;
  }();
  return tiles;
}

}  // namespace fastres
