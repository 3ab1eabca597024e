// Memory layouts of activation maps.
#pragma once

namespace convmixer_fast {

enum class Layout : int {
  planar = 0,         // w stride 1 (NCHW)
  channels_last = 1,  // c stride 1 (NHWC)
};

}  // namespace convmixer_fast
