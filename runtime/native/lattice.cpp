#include "frame.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace darcnn {
namespace {

constexpr double kSnap = 0.02;                        // so near to 1 the pixels are taken as they are
constexpr double kMinScale = 1 / 64.0, kMaxScale = 16;  // beyond them the size is a mistake
constexpr int kWeightBits = 22;                       // with 8 of a pixel and a sign they fit 32

double choose_scale(const Manifest &manifest, const darcnn_options &options) {
    for (const double size : {options.diameter_px, options.mpp})
        if (!(size >= 0 && std::isfinite(size)))
            throw Error(DARCNN_ERROR_ARGUMENT, "options", "diameter_px or mpp is not a size", "give a number above 0");
    if (options.diameter_px > 0) return manifest.nominal_diameter_px / options.diameter_px;
    return options.mpp > 0 && manifest.mpp ? options.mpp / *manifest.mpp : 1;
}

// The pixel of 0..n-1 that stands at `at`; the last one is not doubled.
int reflect(int at, int n) {
    if (n == 1) return 0;
    const int period = 2 * (n - 1), inside = (at % period + period) % period;
    return std::min(inside, period - inside);
}

// Which pixels of a line weigh in one network pixel.
struct Taps {
    int first;
    std::vector<std::int32_t> weights;
};

// A triangle over as many pixels as the network pixel covers, at least one to each side: linear interpolation when
// enlarging, antialiased when reducing. Weights in fixed point, and where the pixels in hand begin and end in single
// precision, as Pillow has them: the bytes are those that Python makes.
std::vector<Taps> make_taps(int first, int last, double factor, int extent) {
    const double radius = std::max(factor, 1.0), margin = std::ceil(radius) + 1;
    const double origin = std::max(std::floor(first * factor) - margin, 0.0);
    const double end = std::min(std::ceil(last * factor) + margin, static_cast<double>(extent));
    const float low = static_cast<float>(first * factor - origin);
    const float high = static_cast<float>(std::min(last * factor - origin, end - origin));
    const double step = static_cast<double>(high - low) / (last - first), reach = std::max(step, 1.0);
    std::vector<Taps> line;
    for (int at = 0; at < last - first; ++at) {
        const double centre = low + (at + 0.5) * step;
        const int from = std::max(static_cast<int>(centre - reach + 0.5), 0);
        const int to = static_cast<int>(std::min(std::floor(centre + reach + 0.5), end - origin));
        std::vector<double> heights;
        for (int i = from; i < to; ++i) heights.push_back(std::max(0.0, 1 - std::abs((i - centre + 0.5) * (1 / reach))));
        const double sum = std::accumulate(heights.begin(), heights.end(), 0.0);
        Taps taps{from + static_cast<int>(origin), {}};
        for (const double height : heights) taps.weights.push_back(static_cast<std::int32_t>(std::lround(height / sum * (1 << kWeightBits))));
        line.push_back(std::move(taps));
    }
    return line;
}

// The weighted mean of pixels that lie `step` bytes apart.
std::uint8_t blend(const std::uint8_t *pixels, std::size_t step, const Taps &taps) {
    std::int32_t sum = 1 << (kWeightBits - 1);
    for (std::size_t i = 0; i < taps.weights.size(); ++i) sum += pixels[i * step] * taps.weights[i];
    return static_cast<std::uint8_t>(std::clamp(sum >> kWeightBits, 0, 255));
}

// Network pixels x0..x1-1, y0..y1-1 of an image that is scaled: along rows first, then along columns.
std::vector<std::uint8_t> resample(const Image &image, const Plan &plan, int x0, int y0, int x1, int y1) {
    const std::vector<Taps> across = make_taps(x0, x1, plan.factor_x, image.width);
    const std::vector<Taps> down = make_taps(y0, y1, plan.factor_y, image.height);
    const int top = down.front().first, bottom = down.back().first + static_cast<int>(down.back().weights.size());
    const std::size_t channels = image.channels, row = channels * (x1 - x0);
    std::vector<std::uint8_t> narrow(row * (bottom - top));
    auto out = narrow.begin();
    for (int y = top; y < bottom; ++y) {
        const std::uint8_t *line = image.bytes.data() + channels * image.width * y;
        for (const Taps &taps : across)
            for (std::size_t c = 0; c < channels; ++c) *out++ = blend(line + channels * taps.first + c, channels, taps);
    }
    std::vector<std::uint8_t> found;
    found.reserve(row * (y1 - y0));
    for (const Taps &taps : down)
        for (std::size_t i = 0; i < row; ++i) found.push_back(blend(narrow.data() + row * (taps.first - top) + i, row, taps));
    return found;
}

}  // namespace

Plan make_plan(const Manifest &manifest, int width, int height, const darcnn_options &options) {
    const double scale = choose_scale(manifest, options);
    if (!(scale >= kMinScale && scale <= kMaxScale)) {
        const std::string problem = "its pixels would have to be scaled by " + std::to_string(scale) + " to fit the model";
        throw Error(DARCNN_ERROR_INPUT, "frame", problem, "check diameter_px and mpp");
    }
    Plan plan{width, height, 1, 1, {}};
    if (std::abs(scale - 1) >= kSnap) {
        plan.width = std::max(1, static_cast<int>(std::nearbyint(width * scale)));
        plan.height = std::max(1, static_cast<int>(std::nearbyint(height * scale)));
        plan.factor_x = static_cast<double>(width) / plan.width;
        plan.factor_y = static_cast<double>(height) / plan.height;
    }
    // a core is its read without the halo; beyond the edges of the frame a halo would show nothing
    const int span = manifest.tile_px, halo = manifest.halo_px, step = span - 2 * halo;
    const auto end = [&](int read, int size) { return read + span < size ? read + step + halo : size; };
    int index = 0;
    for (int y = 0, y0 = 0; y0 < plan.height; y0 = end(y, plan.height), y += step)
        for (int x = 0, x0 = 0; x0 < plan.width; x0 = end(x, plan.width), x += step)
            plan.tiles.push_back({index++, x0, y0, end(x, plan.width), end(y, plan.height), x, y});
    return plan;
}

void read_tile(const Image &image, const Plan &plan, const Tile &tile, int tile_px, std::uint8_t *out) {
    std::vector<int> xs, ys;
    for (int i = 0; i < tile_px; ++i) {
        xs.push_back(reflect(tile.x + i, plan.width));
        ys.push_back(reflect(tile.y + i, plan.height));
    }
    const auto [left, right] = std::minmax_element(xs.begin(), xs.end());
    const auto [top, bottom] = std::minmax_element(ys.begin(), ys.end());
    // at scale 1 each pixel has the whole weight of its own: nothing changes
    const std::vector<std::uint8_t> scaled = resample(image, plan, *left, *top, *right + 1, *bottom + 1);
    const std::size_t width = *right + 1 - *left;
    for (const int y : ys)
        for (const int x : xs)
            out = std::copy_n(&scaled[((y - *top) * width + (x - *left)) * image.channels], image.channels, out);
}

}  // namespace darcnn
