// How a frame goes through a model: bytes, scale, tiles and their pixels; darcnn.runtime's intensity, planning, tiling
// and sampling.
#pragma once

#include <vector>

#include "bundle.hpp"

namespace darcnn {

struct Image {
    int width, height, channels;
    std::vector<std::uint8_t> bytes;  // rows of interleaved channels
};

// The whole frame as bytes: the model's channels, through the window given or the model's intensity rule.
// Throws Error where the frame is no image in memory, or its channels do not serve.
Image to_bytes(const darcnn_frame &frame, const darcnn_options &options, const Manifest &manifest);

constexpr double kSeamPx = 4;  // two tiles see an object slightly differently: its centre may lie in neither core

// Half-open regions in network pixels of the frame.
struct Tile {
    int index;                                // row-major number
    int core_x0, core_y0, core_x1, core_y1;  // the ground it owns
    int x, y;                                 // its first pixel; it may stick out of the frame

    bool owns(double cx, double cy, double margin = 0) const {
        return core_x0 - margin <= cx && cx < core_x1 + margin && core_y0 - margin <= cy && cy < core_y1 + margin;
    }
};

struct Plan {
    int width, height;           // of the frame, network pixels
    double factor_x, factor_y;  // pixels of the frame per network pixel
    std::vector<Tile> tiles;
};

// Throws Error where a size is none, or far from the model's.
Plan make_plan(const Manifest &manifest, int width, int height, const darcnn_options &options);

// Write the (S, S, C) pixels of a tile to `out`; beyond the frame's edges its pixels are reflected.
void read_tile(const Image &image, const Plan &plan, const Tile &tile, int tile_px, std::uint8_t *out);

}  // namespace darcnn
