// Frames in, objects out; darcnn.runtime.segmenter for one image.
#pragma once

#include <memory>
#include <mutex>

#include "engine.hpp"
#include "frame.hpp"
#include "objects.hpp"

namespace darcnn {

struct Model {
    const Manifest manifest;
    const std::unique_ptr<Engine> engine;
    std::mutex mutex;  // of the engine
};

// Any number of threads may call it; the engine runs one batch of tiles after another. Throws Error.
std::vector<Object> segment(Model &model, const darcnn_frame &frame, const darcnn_options &options);

}  // namespace darcnn
