// Frames in, objects out; darcnn.runtime.segmenter for one image.
#pragma once

#include <memory>
#include <mutex>

#include "engine.hpp"
#include "lattice.hpp"
#include "objects.hpp"

namespace darcnn {

// Any number of threads may call `segment`; the engine runs one batch of tiles after another.
class Segmenter {
  public:
    Segmenter(Manifest manifest, std::unique_ptr<Engine> engine) : manifest_(std::move(manifest)), engine_(std::move(engine)) {}
    std::vector<Object> segment(const darcnn_frame &frame, const darcnn_options &options);  // throws Error

  private:
    struct Found {  // one box, tile pixels, and its probabilities
        int tile;
        float box[4];
        float score;
        std::vector<float> mask;
    };
    std::vector<Found> run(const Plan &plan, std::size_t first, const std::vector<std::uint8_t> &tiles, float min_score);
    void add_masks(std::vector<Found> &found, std::size_t first);
    std::vector<int> choose_slots(const Plan &plan, const Tile &tile, const float *boxes, const float *scores,
                                  bool is_converged, float min_score) const;
    bool is_cut(const Plan &plan, const Tile &tile, const float *box) const;
    std::vector<Object> place(const Plan &plan, const Tile &tile, const std::vector<Found> &found, int width, int height) const;

    Manifest manifest_;
    std::unique_ptr<Engine> engine_;
    std::mutex mutex_;  // of the engine
};

}  // namespace darcnn
