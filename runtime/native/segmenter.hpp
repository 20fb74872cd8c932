// Frames in, objects out; darcnn.runtime.segmenter for one image.
#pragma once

#include <memory>
#include <mutex>

#include "engine.hpp"
#include "frame.hpp"
#include "objects.hpp"

namespace darcnn {

// Any number of threads may call `segment`; the engine runs one batch of tiles after another.
class Segmenter {
  public:
    Segmenter(Manifest manifest, std::unique_ptr<Engine> engine) : manifest_(std::move(manifest)), engine_(std::move(engine)) {}
    std::vector<Object> segment(const darcnn_frame &frame, const darcnn_options &options);  // throws Error

  private:
    Manifest manifest_;
    std::unique_ptr<Engine> engine_;
    std::mutex mutex_;  // of the engine
};

}  // namespace darcnn
