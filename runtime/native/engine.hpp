// What runs the two graphs of a bundle; the one place where a machine learning library is seen.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "bundle.hpp"

namespace darcnn {

// B tiles, D slots each.
struct Detections {
    std::vector<float> boxes;              // (B, D, 4) x0 y0 x1 y1, tile pixels
    std::vector<float> scores;             // (B, D), 0: empty slot
    std::vector<std::uint8_t> converged;  // (B,)
};

// One thread at a time. What fails throws Error; the next call may succeed.
class Engine {
  public:
    virtual ~Engine() = default;
    std::string name;  // what it runs on, with its version
    // Finds objects on `tiles`, (B, S, S, C). The features that masks are made from stay with the engine.
    virtual Detections detect(const std::vector<std::uint8_t> &tiles) = 0;
    // Of the last `detect`: boxes (M, 4) on tiles `tile_index` (M,), exactly M = mask_batch -> (M, m, m) 0..1.
    virtual std::vector<float> masks(const std::vector<float> &boxes, const std::vector<std::int64_t> &tile_index) = 0;
};

std::unique_ptr<Engine> open_openvino(const Bundle &bundle, int threads);
std::unique_ptr<Engine> open_tensorrt(const Bundle &bundle, const std::string &engine_dir);

}  // namespace darcnn
