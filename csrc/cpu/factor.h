// The factor from dot products to logits.
#pragma once

namespace m3bind::cpu {

// log2(e) * logit = value of a tile * (high + low). The two parts keep the product exact to
// float32's last bit: a rounded factor would shift all logits together, by 6e-6 at a scale of 100.
struct Factor {
  float high;
  float low;
};

}  // namespace m3bind::cpu
