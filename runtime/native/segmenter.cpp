#include "segmenter.hpp"

#include <algorithm>
#include <cmath>

namespace darcnn {
namespace {

constexpr float kEdgePx = 1;              // a box this close to a tile's edge touches it
constexpr double kFarthest = 1e38;        // limit of a window: float holds the distance of two
constexpr double kReachPx = 2 * kSeamPx;  // two tiles see an outline slightly differently

float iou(const float *a, const float *b) {
    const auto area = [](float width, float height) { return std::max(width, 0.0F) * std::max(height, 0.0F); };
    const float shared = area(std::min(a[2], b[2]) - std::max(a[0], b[0]), std::min(a[3], b[3]) - std::max(a[1], b[1]));
    const float all = area(a[2] - a[0], a[3] - a[1]) + area(b[2] - b[0], b[3] - b[1]) - shared;
    return all > 0 ? shared / all : 0.0F;
}

// Greedy suppression: of slots that overlap more than `threshold` the best stays.
std::vector<int> suppress(std::vector<int> slots, const float *boxes, const float *scores, float threshold) {
    std::stable_sort(slots.begin(), slots.end(), [&](int a, int b) { return scores[a] > scores[b]; });
    std::vector<int> kept;
    for (const int slot : slots) {
        const auto overlaps = [&](int other) { return iou(boxes + 4 * other, boxes + 4 * slot) > threshold; };
        if (std::none_of(kept.begin(), kept.end(), overlaps)) kept.push_back(slot);
    }
    return kept;
}

// Whether a span along one axis is that of an object on the frame, not of its mirror image beyond the edge.
bool lies_inside(double low, double high, double extent) {
    const double covered = std::min(high, extent) - std::max(low, 0.0);
    return covered > 0 && covered >= 1.0 / 3 * std::min(high - low, extent);
}

// Whether a span in pixels of the frame reaches a seam of its tile, or nearly.
bool reaches_seam(double low, double high, int core_low, int core_high, int extent, double factor) {
    return (core_low > 0 && low <= (core_low + kReachPx) * factor) ||
           (core_high < extent && high >= (core_high - kReachPx) * factor);
}

// One box, tile pixels, and its probabilities.
struct Found {
    int tile;
    float box[4];
    float score;
    std::vector<float> mask;
};

bool is_cut(const Manifest &m, const Plan &plan, const Tile &tile, const float *box) {
    const int size = m.tile_px;  // an edge counts where the frame goes on beyond it
    const float last = static_cast<float>(size) - kEdgePx;
    return (box[0] <= kEdgePx && tile.x > 0) || (box[1] <= kEdgePx && tile.y > 0) ||
           (box[2] >= last && tile.x + size < plan.width) || (box[3] >= last && tile.y + size < plan.height);
}

// The slots whose objects are good enough, and the tile's to report.
std::vector<int> choose_slots(const Manifest &m, const Plan &plan, const Tile &tile, const float *boxes, const float *scores,
                              bool is_converged, float min_score) {
    std::vector<int> slots, chosen;
    for (int slot = 0; slot < m.detections; ++slot)
        if (scores[slot] > 0 && scores[slot] >= min_score) slots.push_back(slot);
    // a graph that has not converged kept too many: greedy suppression of those keeps what it keeps of all
    if (!is_converged) slots = suppress(slots, boxes, scores, static_cast<float>(m.nms_threshold));
    for (const int slot : slots) {
        const float *box = boxes + 4 * slot;
        const double sides = static_cast<double>(std::max(box[2] - box[0], 0.0F)) * std::max(box[3] - box[1], 0.0F);
        if (!(std::sqrt(sides) <= m.max_diameter_px.value_or(HUGE_VAL))) continue;
        const double x0 = box[0] + static_cast<double>(tile.x), x1 = box[2] + static_cast<double>(tile.x);
        const double y0 = box[1] + static_cast<double>(tile.y), y1 = box[3] + static_cast<double>(tile.y);
        if (!lies_inside(x0, x1, plan.width) || !lies_inside(y0, y1, plan.height)) continue;
        const double w = plan.width, h = plan.height;
        const double x = (std::clamp(x0, 0.0, w) + std::clamp(x1, 0.0, w)) / 2;
        const double y = (std::clamp(y0, 0.0, h) + std::clamp(y1, 0.0, h)) / 2;
        // beyond its core a tile reports only what it sees whole: half an object has its centre elsewhere
        if (tile.owns(x, y) || (tile.owns(x, y, kSeamPx) && !is_cut(m, plan, tile, box))) chosen.push_back(slot);
    }
    return chosen;
}

void add_masks(Engine &engine, const Manifest &m, std::vector<Found> &found, std::size_t first) {
    const std::size_t batch = m.mask_batch, cells = static_cast<std::size_t>(m.mask_px) * m.mask_px;
    for (std::size_t start = 0; start < found.size(); start += batch) {
        const std::size_t n = std::min(batch, found.size() - start);
        std::vector<float> boxes(4 * batch, 0.0F);
        std::vector<std::int64_t> index(batch, 0);
        for (std::size_t i = 0; i < batch; ++i) {  // filled up with a box that certainly has pixels
            boxes[4 * i + 2] = boxes[4 * i + 3] = static_cast<float>(m.tile_px);
            if (i >= n) continue;
            std::copy_n(found[start + i].box, 4, &boxes[4 * i]);
            index[i] = found[start + i].tile - static_cast<std::int64_t>(first);
        }
        const std::vector<float> masks = engine.masks(boxes, index);
        for (std::size_t i = 0; i < n; ++i) found[start + i].mask.assign(&masks[cells * i], &masks[cells * i] + cells);
    }
}

std::vector<Found> run(Engine &engine, const Manifest &m, const Plan &plan, std::size_t first,
                       const std::vector<std::uint8_t> &tiles, float min_score) {
    const Detections seen = engine.detect(tiles);
    std::vector<Found> found;
    const std::size_t n = std::min<std::size_t>(m.batch, plan.tiles.size() - first);
    for (std::size_t i = 0; i < n; ++i) {
        const float *scores = seen.scores.data() + i * m.detections;
        const float *boxes = seen.boxes.data() + 4 * i * m.detections;
        const Tile &tile = plan.tiles[first + i];
        for (const int slot : choose_slots(m, plan, tile, boxes, scores, seen.converged[i] != 0, min_score)) {
            const float *box = boxes + 4 * slot;
            found.push_back({tile.index, {box[0], box[1], box[2], box[3]}, scores[slot], {}});
        }
    }
    add_masks(engine, m, found, first);
    return found;
}

std::vector<Object> place(const Manifest &m, const Plan &plan, const Tile &tile, const std::vector<Found> &found, int width,
                          int height) {
    std::vector<Object> objects;
    for (const Found &one : found) {
        if (one.tile != tile.index) continue;
        const double shift[] = {double(tile.x), double(tile.y)}, factor[] = {plan.factor_x, plan.factor_y};
        double box[4];  // pixels of the frame
        for (int k = 0; k < 4; ++k) box[k] = (one.box[k] + shift[k % 2]) * factor[k % 2];
        Object object{};
        object.score = one.score, object.is_truncated = is_cut(m, plan, tile, one.box), object.tile = tile.index;
        const auto clip = [](float value, float extent) { return std::clamp(value, 0.0F, extent); };
        object.x0 = clip(box[0], width), object.x1 = clip(box[2], width);
        object.y0 = clip(box[1], height), object.y1 = clip(box[3], height);
        object.is_near_seam =
            reaches_seam(object.x0, object.x1, tile.core_x0, tile.core_x1, plan.width, plan.factor_x) ||
            reaches_seam(object.y0, object.y1, tile.core_y0, tile.core_y1, plan.height, plan.factor_y);
        if (draw_object(object, one.mask.data(), m.mask_px, box, width, height)) objects.push_back(std::move(object));
    }
    drop_covered(objects);
    return objects;
}

}  // namespace

std::vector<Object> segment(Model &model, const darcnn_frame &frame, const darcnn_options &options) {
    const Manifest &m = model.manifest;
    const double low = options.window_low, high = options.window_high;
    if ((low != 0 || high != 0) && !(low < high && -kFarthest <= low && high <= kFarthest))
        throw Error(DARCNN_ERROR_ARGUMENT, "options", "window_low is not below window_high, both within 1e38", "give the raw limits");
    if (!(options.min_score <= 1))  // so is NaN
        throw Error(DARCNN_ERROR_ARGUMENT, "options", "min_score is not a number between 0 and 1", "give one, or -1");
    const double min_score = options.min_score < 0 ? m.min_score : options.min_score;
    const Image image = to_bytes(frame, options, m);
    const Plan plan = make_plan(m, image.width, image.height, options);
    const std::size_t batch = m.batch, side = m.tile_px, tile_size = side * side * m.channels;
    std::vector<Object> objects;
    for (std::size_t first = 0; first < plan.tiles.size(); first += batch) {
        const std::size_t last = std::min(first + batch, plan.tiles.size());
        std::vector<std::uint8_t> tiles(batch * tile_size);
        for (std::size_t i = first; i < last; ++i) read_tile(image, plan, plan.tiles[i], m.tile_px, tiles.data() + (i - first) * tile_size);
        std::unique_lock<std::mutex> lock(model.mutex);
        const std::vector<Found> found = run(*model.engine, m, plan, first, tiles, static_cast<float>(min_score));
        lock.unlock();
        for (std::size_t i = first; i < last; ++i)
            for (Object &object : place(m, plan, plan.tiles[i], found, image.width, image.height)) objects.push_back(std::move(object));
    }
    drop_twins(objects);
    return objects;
}

}  // namespace darcnn
