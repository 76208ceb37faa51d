#include "layer_norm/layer_norm.h"

namespace specrt {

Launch layer_norm(const NormArgs& args) {
    return norm_launch(args, layer_norm_part_for(active_isa()), layer_norm_cuda);
}

}  // namespace specrt
