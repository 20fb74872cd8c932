// One found object, and what is decided from masks; darcnn.runtime's masks and seams.
#pragma once

#include <cstdint>
#include <vector>

namespace darcnn {

// Pixels of the frame, as in darcnn_object.
struct Object {
    float x0, y0, x1, y1;
    float score;
    bool is_truncated;
    int tile;           // that reported it
    bool is_near_seam;  // another tile may have reported it too
    int mask_x = 0, mask_y = 0, mask_width = 0, mask_height = 0;
    std::vector<std::uint8_t> mask;  // 0 or 1
    std::vector<double> outline;     // x y, closed

    bool has(int x, int y) const {  // a pixel of the frame
        const int column = x - mask_x, row = y - mask_y;
        return column >= 0 && column < mask_width && row >= 0 && row < mask_height &&
               mask[static_cast<std::size_t>(row) * mask_width + column];
    }
};

// Draw the outline and the mask of an object from (m, m) probabilities that cover `box`, x0 y0 x1 y1 in pixels of the
// frame, which may leave it. False where no pixel of the frame is in the object.
bool draw_object(Object &object, const float *probabilities, int m, const double box[4], int width, int height);

// Drop those that lie for more than half in better ones.
void drop_covered(std::vector<Object> &objects);

// Write n + 1 where object n is, into rows of `width` labels; of several the best, of equal ones the first.
void draw_labels(const std::vector<Object> &objects, int width, std::int32_t *labels);

// Of two reports from different tiles of which the worse lies for more than half in the better, keep the better one.
void drop_twins(std::vector<Object> &objects);

}  // namespace darcnn
