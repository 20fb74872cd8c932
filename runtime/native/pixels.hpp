// Raw pixels of a frame to the bytes that a model sees; darcnn.runtime.intensity in C++.
#pragma once

#include <vector>

#include "darcnn.h"
#include "manifest.hpp"

namespace darcnn {

struct Image {
    int width, height, channels;
    std::vector<std::uint8_t> bytes;  // rows of interleaved channels
};

// The whole frame as bytes: the model's channels, through the window given or the model's intensity rule.
// Throws Error where the frame is no image in memory, or its channels do not serve.
Image to_bytes(const darcnn_frame &frame, const darcnn_options &options, const Manifest &manifest);

}  // namespace darcnn
