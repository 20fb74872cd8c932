#include "objects.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

namespace darcnn {
namespace {

constexpr double kLevel = 0.5;       // a pixel belongs to an object where its probability is above
constexpr double kNudge = 1e-9;      // a value of exactly 0.5 is outside; so near to it no contour touches itself
constexpr double kMaxCovered = 0.5;  // share of its pixels that an object may lose to better ones

struct Point {
    double x, y;
};
using Ring = std::vector<Point>;  // closed: the first is repeated

// A grid of values; beyond its borders all is 0, which closes every contour.
struct Grid {
    int x0, y0, width, height;  // pixels of the frame
    std::vector<double> values;
    double at(int x, int y) const { return x < 0 || y < 0 || x >= width || y >= height ? 0.0 : values[index(x, y)]; }
    std::size_t index(int x, int y) const { return static_cast<std::size_t>(y) * width + x; }
};

struct Sample {
    int lower, upper;
    double weight;  // of the upper
};

// Where the centres of `n` pixels from `first` on lie between the m cells that span `low` to `high`.
std::vector<Sample> make_samples(int first, int n, double low, double high, int m) {
    std::vector<Sample> samples;
    for (int i = 0; i < n; ++i) {
        const double at = std::clamp((first + i + 0.5 - low) / (high - low) * m - 0.5, 0.0, m - 1.0);
        const int lower = std::min(static_cast<int>(at), std::max(m - 2, 0));
        samples.push_back({lower, std::min(lower + 1, m - 1), at - lower});
    }
    return samples;
}

// Bilinear, along columns first.
void interpolate(Grid &grid, const float *cells, int m, const double box[4]) {
    const std::vector<Sample> across = make_samples(grid.x0, grid.width, box[0], box[2], m);
    std::vector<double> row(m);
    for (const Sample &y : make_samples(grid.y0, grid.height, box[1], box[3], m)) {
        for (int j = 0; j < m; ++j) row[j] = cells[y.lower * m + j] * (1 - y.weight) + cells[y.upper * m + j] * y.weight;
        for (const Sample &x : across) {
            const double value = row[x.lower] * (1 - x.weight) + row[x.upper] * x.weight;
            grid.values.push_back(!std::isfinite(value) ? 0.0 : value == kLevel ? kLevel - kNudge : value);
        }
    }
}

double double_area(const Ring &ring) {
    double sum = 0;
    for (std::size_t i = 0; i + 1 < ring.size(); ++i) sum += ring[i].x * ring[i + 1].y - ring[i + 1].x * ring[i].y;
    return std::abs(sum);
}

// Squares of four grid points are named by their upper left one. Side k lies between corners k and k + 1, clockwise:
// 0 upper, 1 right, 2 lower, 3 left. A contour enters a square by a side, the inside on its right.
struct Crossing {
    int x, y, side;
};

constexpr std::array<int, 4> kCornerX = {0, 1, 1, 0}, kCornerY = {0, 0, 1, 1};
constexpr std::array<int, 4> kNextX = {0, 1, 0, -1}, kNextY = {-1, 0, 1, 0};  // the square beyond each side

// Where the value is 0.5 on the crossed side, in pixels of the frame.
Point locate(const Grid &grid, const Crossing &c) {
    const int end = (c.side + 1) % 4;
    const int ax = c.x + kCornerX[c.side], ay = c.y + kCornerY[c.side];
    const int bx = c.x + kCornerX[end], by = c.y + kCornerY[end];
    const double a = grid.at(ax, ay), b = grid.at(bx, by), t = (kLevel - a) / (b - a);
    return {grid.x0 + 0.5 + ax + t * (bx - ax), grid.y0 + 0.5 + ay + t * (by - ay)};
}

// The next crossing of the same contour (marching squares).
Crossing advance(const Grid &grid, const Crossing &c) {
    std::array<double, 4> values{};
    for (int k = 0; k < 4; ++k) values[k] = grid.at(c.x + kCornerX[k], c.y + kCornerY[k]);
    const auto is_inside = [&](int k) { return values[k % 4] > kLevel; };
    int out = c.side + 1;
    if (is_inside(c.side) == is_inside(c.side + 2) && is_inside(c.side + 1) == is_inside(c.side + 3)) {
        // a saddle: where its middle is inside, an outer corner is cut off, else an inner one
        out = c.side + (values[0] + values[1] + values[2] + values[3] > 4 * kLevel ? 1 : 3);
    } else {
        while (is_inside(out) == is_inside(out + 1)) ++out;
    }
    out %= 4;
    return {c.x + kNextX[out], c.y + kNextY[out], (out + 2) % 4};
}

// The closed contour at 0.5 that has the largest area; empty if there is none.
Ring largest_contour(const Grid &grid) {
    Ring best;
    std::vector<bool> is_done(grid.values.size());
    // every contour goes down somewhere, between a point inside and one outside to its right
    for (int y = 0; y < grid.height; ++y) {
        for (int x = 0; x < grid.width; ++x) {
            if (is_done[grid.index(x, y)] || !(grid.at(x, y) > kLevel) || grid.at(x + 1, y) > kLevel) continue;
            Ring ring;
            Crossing c{x, y, 0};
            do {
                if (c.side == 0) is_done[grid.index(c.x, c.y)] = true;
                ring.push_back(locate(grid, c));
                c = advance(grid, c);
            } while (c.x != x || c.y != y || c.side != 0);
            ring.push_back(ring.front());
            if (double_area(ring) > double_area(best)) best = std::move(ring);
        }
    }
    return best;
}

int clipped_ceil(double value, int first, int n) {
    return static_cast<int>(std::clamp(std::ceil(value - 0.5) - first, 0.0, static_cast<double>(n)));
}

// 1 where a pixel's centre lies inside the ring; on the outline it is on the left and upper side only.
std::vector<std::uint8_t> draw_ring(const Ring &ring, const Grid &grid) {
    const std::size_t stride = grid.width + 1;
    std::vector<std::uint8_t> turns(stride * grid.height);  // inside and outside change here
    for (std::size_t i = 0; i + 1 < ring.size(); ++i) {
        const Point a = ring[i], b = ring[i + 1];
        const int from = clipped_ceil(a.y, grid.y0, grid.height), to = clipped_ceil(b.y, grid.y0, grid.height);
        for (int row = std::min(from, to); row < std::max(from, to); ++row) {
            const double x = a.x + (row + (grid.y0 + 0.5) - a.y) * ((b.x - a.x) / (b.y - a.y));
            turns[stride * row + clipped_ceil(x, grid.x0, grid.width)] ^= 1;
        }
    }
    for (std::size_t i = 1; i < turns.size(); ++i)
        if (i % stride) turns[i] ^= turns[i - 1];
    return turns;
}

// How many pixels of `object` any of `others` has too.
double count_shared(const Object &object, const std::vector<const Object *> &others) {
    std::vector<const Object *> near;
    for (const Object *other : others)
        if (other->mask_x < object.mask_x + object.mask_width && object.mask_x < other->mask_x + other->mask_width &&
            other->mask_y < object.mask_y + object.mask_height && object.mask_y < other->mask_y + other->mask_height) near.push_back(other);
    int n = 0;
    for (int y = object.mask_y; !near.empty() && y < object.mask_y + object.mask_height; ++y) {
        for (int x = object.mask_x; x < object.mask_x + object.mask_width; ++x) {
            const auto has_it = [&](const Object *other) { return other->has(x, y); };
            n += object.has(x, y) && std::any_of(near.begin(), near.end(), has_it);
        }
    }
    return n;
}

double count_pixels(const Object &object) { return count_shared(object, {&object}); }

// The best first; of equal scores the earlier one.
std::vector<std::size_t> rank(const std::vector<Object> &objects) {
    std::vector<std::size_t> order(objects.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return objects[a].score > objects[b].score; });
    return order;
}

void keep(std::vector<Object> &objects, const std::vector<bool> &is_kept) {
    std::vector<Object> kept;
    for (std::size_t i = 0; i < objects.size(); ++i)
        if (is_kept[i]) kept.push_back(std::move(objects[i]));
    objects = std::move(kept);
}

}  // namespace

bool draw_object(Object &object, const float *probabilities, int m, const double box[4], int width, int height) {
    // pixel i is in the box where its centre is
    Grid grid{clipped_ceil(box[0], 0, width), clipped_ceil(box[1], 0, height), 0, 0, {}};
    grid.width = clipped_ceil(box[2], 0, width) - grid.x0;
    grid.height = clipped_ceil(box[3], 0, height) - grid.y0;
    if (grid.width <= 0 || grid.height <= 0) return false;
    interpolate(grid, probabilities, m, box);
    const Ring ring = largest_contour(grid);
    const std::vector<std::uint8_t> drawn = draw_ring(ring, grid);
    int x0 = grid.width, y0 = grid.height, x1 = 0, y1 = 0;
    const auto pixel = [&](int x, int y) { return drawn[static_cast<std::size_t>(grid.width + 1) * y + x]; };
    for (int y = 0; y < grid.height; ++y)
        for (int x = 0; x < grid.width; ++x)
            if (pixel(x, y)) x0 = std::min(x0, x), y0 = std::min(y0, y), x1 = std::max(x1, x + 1), y1 = y + 1;
    if (x1 == 0) return false;
    object.mask_x = grid.x0 + x0, object.mask_y = grid.y0 + y0;
    object.mask_width = x1 - x0, object.mask_height = y1 - y0;
    for (int y = y0; y < y1; ++y)
        for (int x = x0; x < x1; ++x) object.mask.push_back(pixel(x, y));
    for (const Point &point : ring) object.outline.insert(object.outline.end(), {point.x, point.y});
    return true;
}

void draw_labels(const std::vector<Object> &objects, int width, std::int32_t *labels) {
    const std::vector<std::size_t> order = rank(objects);
    for (auto i = order.rbegin(); i != order.rend(); ++i) {  // the best is drawn last
        const Object &o = objects[*i];
        std::int32_t *at = labels + static_cast<std::size_t>(o.mask_y) * width + o.mask_x;
        for (std::size_t k = 0; k < o.mask.size(); ++k)
            if (o.mask[k]) at[k / o.mask_width * width + k % o.mask_width] = static_cast<std::int32_t>(*i + 1);
    }
}

void drop_covered(std::vector<Object> &objects) {
    std::vector<bool> is_kept(objects.size());
    std::vector<const Object *> better;
    for (const std::size_t i : rank(objects)) {
        is_kept[i] = count_shared(objects[i], better) <= kMaxCovered * count_pixels(objects[i]);
        if (is_kept[i]) better.push_back(&objects[i]);
    }
    keep(objects, is_kept);
}

void drop_twins(std::vector<Object> &objects) {
    std::vector<bool> is_kept(objects.size(), true), is_decided(objects.size());
    for (const std::size_t i : rank(objects)) {
        if (!is_kept[i] || !objects[i].is_near_seam) continue;
        is_decided[i] = true;
        for (std::size_t j = 0; j < objects.size(); ++j) {
            if (!objects[j].is_near_seam || is_decided[j] || objects[j].tile == objects[i].tile) continue;
            if (const double n = count_shared(objects[i], {&objects[j]}); n > 0 && n > kMaxCovered * count_pixels(objects[j])) is_kept[j] = false;
        }
    }
    keep(objects, is_kept);
}

}  // namespace darcnn
