#include "frame.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>

namespace darcnn {
namespace {

constexpr int kMaxSide = 65536;
constexpr double kMaxSample = 1 << 24;  // pixels held at most to measure the brightness
constexpr int kSampleGrid = 8;          // 8 x 8 regions stand for a frame that is larger
constexpr double kWhitest = 99.9;       // per cent: a hot pixel says nothing
constexpr double kWhiteAtMost = 2;      // of pixels from 0 to 1: sharpening goes a little beyond the ends
constexpr double kMaxFactor = 1e38;     // grey levels a raw value: the largest that float holds
constexpr std::size_t kItemSize[] = {1, 2, 4};

struct Window {
    double low, high;
};

void check_frame(const darcnn_frame &f) {
    const auto demand = [](bool is_right, const std::string &problem, const char *fix) {
        if (!is_right) throw Error(DARCNN_ERROR_ARGUMENT, "frame", problem, fix);
    };
    demand(f.pixels, "pixels is a null pointer", "give the address of the first pixel");
    demand(f.type >= DARCNN_UINT8 && f.type <= DARCNN_FLOAT32, "unknown pixel type", "give a darcnn_pixel_type");
    demand(f.width > 0 && f.height > 0 && f.width <= kMaxSide && f.height <= kMaxSide,
           "of " + std::to_string(f.width) + " x " + std::to_string(f.height) + " pixels", "give sides of 1 to 65536");
    demand(f.channels > 0 && f.channels <= 64, std::to_string(f.channels) + " channels", "give 1 to 64");
    demand(!f.is_rgb || f.channels == 3 || f.channels == 4, "is_rgb with neither 3 nor 4 channels", "set is_rgb to 0");
    const std::size_t item = kItemSize[f.type], row = item * f.width * f.channels;
    const bool is_aligned = f.row_stride_bytes % item == 0 && reinterpret_cast<std::uintptr_t>(f.pixels) % item == 0;
    demand(is_aligned, "pixels or row_stride_bytes are not aligned for the pixel type", "copy the frame");
    demand(f.row_stride_bytes >= row && f.row_stride_bytes <= SIZE_MAX / kMaxSide,
           "row_stride_bytes is " + std::to_string(f.row_stride_bytes) + ", a row has " + std::to_string(row),
           "give the distance between rows");
    const std::size_t needed = f.row_stride_bytes * (f.height - 1) + row;
    demand(f.size_bytes >= needed,
           "size_bytes is " + std::to_string(f.size_bytes) + ", the frame needs " + std::to_string(needed),
           "check width, height, type and stride");
}

// Which channels of a frame a model sees, and their values.
class Channels {
  public:
    const int n;
    bool is_separate = false;  // each channel has brightness limits of its own

    Channels(const darcnn_frame &frame, int wanted, int channel) : n(wanted), frame_(frame) {
        const auto refuse = [](const std::string &what, const char *fix) { throw Error(DARCNN_ERROR_INPUT, "frame", what, fix); };
        const int available = frame.is_rgb ? 3 : frame.channels;
        if (channel >= available) refuse("has no channel " + std::to_string(channel), "choose one that it has");
        is_separate = !frame.is_rgb && channel < 0 && n > 1 && (n == 3 ? available == 3 : available >= n);
        if (is_separate) return;
        if (n != 1 && n != 3) refuse("the model sees " + std::to_string(n) + " separate channels", "give a frame that has them");
        if (channel < 0 && available > 1 && !frame.is_rgb) refuse("has several channels", "choose one with options.channel");
        is_mean_ = channel < 0 && frame.is_rgb && n == 1;
        first_ = std::max(channel, 0);
        step_ = channel < 0 && frame.is_rgb ? 1 : 0;  // a grey channel stands for all that the model sees
    }

    // Pixels x0..x1-1 of row y, n values each.
    void read(int y, int x0, int x1, float *out) const {
        if (frame_.type == DARCNN_UINT8) return read_as<std::uint8_t>(y, x0, x1, out);
        if (frame_.type == DARCNN_UINT16) return read_as<std::uint16_t>(y, x0, x1, out);
        read_as<float>(y, x0, x1, out);
    }

  private:
    template <typename T>
    void read_as(int y, int x0, int x1, float *out) const {
        const auto *row = static_cast<const std::byte *>(frame_.pixels) + frame_.row_stride_bytes * y;
        const T *at = reinterpret_cast<const T *>(row) + static_cast<std::size_t>(x0) * frame_.channels + first_;
        for (int x = x0; x < x1; ++x, at += frame_.channels) {
            if (is_mean_) {
                const float mean = (static_cast<float>(at[0]) + at[1] + at[2]) / 3.0F;
                *out++ = std::is_integral_v<T> ? std::nearbyint(mean) : mean;
            } else {
                for (int c = 0; c < n; ++c) *out++ = static_cast<float>(at[c * step_]);
            }
        }
    }

    const darcnn_frame &frame_;
    bool is_mean_ = false;
    int first_ = 0, step_ = 1;
};

// The q-th percentile as NumPy interpolates it; reorders `values`.
double percentile(std::vector<float> &values, double q) {
    const double place = static_cast<double>(values.size() - 1) * (q / 100);
    const auto middle = values.begin() + static_cast<std::ptrdiff_t>(place);
    std::nth_element(values.begin(), middle, values.end());
    const float low = *middle, high = middle + 1 == values.end() ? low : *std::min_element(middle + 1, values.end());
    const double weight = place - std::floor(place);
    double step = high - low;                                            // a float, as NumPy has it
    if (!std::isfinite(step)) step = static_cast<double>(high) - low;  // beyond float
    return weight < 0.5 ? low + step * weight : high - step * (1 - weight);
}

// Start and length of what is looked at along an axis: all of it, or the middles of 8 fields.
std::vector<std::pair<int, int>> sample_spans(int extent, double share) {
    if (share >= 1) return {{0, extent}};
    std::vector<std::pair<int, int>> spans;
    for (int k = 0; k < kSampleGrid; ++k) {
        const int low = static_cast<int>(std::int64_t{extent} * k / kSampleGrid);
        const int high = static_cast<int>(std::int64_t{extent} * (k + 1) / kSampleGrid);
        const int length = std::max(1, static_cast<int>((high - low) * std::sqrt(share)));
        spans.emplace_back(low + (high - low - length) / 2, length);
    }
    return spans;
}

// Finite values that stand for the brightness of the frame: of each separate channel, or of all together.
std::vector<std::vector<float>> sample_values(const darcnn_frame &frame, const Channels &channels, bool is_separate) {
    std::vector<std::vector<float>> values(is_separate ? channels.n : 1);
    std::vector<float> row;
    const double share = kMaxSample / (static_cast<double>(frame.width) * frame.height);
    for (const auto &[y0, rows] : sample_spans(frame.height, share)) {
        for (const auto &[x0, length] : sample_spans(frame.width, share)) {
            row.resize(static_cast<std::size_t>(length) * channels.n);
            for (int y = y0; y < y0 + rows; ++y) {
                channels.read(y, x0, x0 + length, row.data());
                for (std::size_t i = 0; i < row.size(); ++i)
                    if (std::isfinite(row[i])) values[i % values.size()].push_back(row[i]);
            }
        }
    }
    return values;
}

// Where 1 is white, a frame with values far above is white all over, and nothing is found on it.
void check_white(std::vector<float> &sample) {
    const double highest = sample.empty() ? 0 : percentile(sample, kWhitest);
    char problem[99];
    std::snprintf(problem, sizeof problem, "its values reach %.4g, where of such numbers 0 is black and 1 is white", highest);
    if (highest > kWhiteAtMost) throw Error(DARCNN_ERROR_INPUT, "frame", problem, "divide them, or give a window");
}

std::vector<Window> measure_percentiles(std::vector<std::vector<float>> values, const Manifest &manifest) {
    std::vector<Window> windows;
    for (std::vector<float> &sample : values) {
        Window window{0, 1};
        if (!sample.empty()) window = {percentile(sample, manifest.intensity_low), percentile(sample, manifest.intensity_high)};
        // without contrast all is black, not amplified noise; beyond 2^53 a step of 1 is lost
        if (!(window.high > window.low)) window.high = window.low + std::max(1.0, std::abs(window.low) * 1e-6);
        windows.push_back(window);
    }
    return windows;
}

std::vector<Window> choose_windows(const darcnn_frame &frame, const darcnn_options &options, const Channels &channels,
                                   const Manifest &manifest) {
    if (options.window_low != 0 || options.window_high != 0) return {{options.window_low, options.window_high}};
    if (manifest.intensity == "range") return {{manifest.intensity_low, manifest.intensity_high}};
    if (manifest.intensity == "percentile") return measure_percentiles(sample_values(frame, channels, channels.is_separate), manifest);
    if (frame.type == DARCNN_FLOAT32) check_white(sample_values(frame, channels, false).front());
    return {{0, frame.type == DARCNN_UINT8 ? 255.0 : frame.type == DARCNN_UINT16 ? 65535.0 : 1.0}};
}

}  // namespace

Image to_bytes(const darcnn_frame &frame, const darcnn_options &options, const Manifest &manifest) {
    check_frame(frame);
    const Channels channels(frame, manifest.channels, options.channel);
    const std::vector<Window> windows = choose_windows(frame, options, channels, manifest);
    std::vector<float> low, factor;
    for (const Window &window : windows) {
        low.push_back(static_cast<float>(window.low));
        factor.push_back(static_cast<float>(std::min(255.0 / (window.high - window.low), kMaxFactor)));
    }
    Image image{frame.width, frame.height, channels.n, {}};
    const std::size_t row_size = static_cast<std::size_t>(frame.width) * channels.n;
    image.bytes.resize(row_size * frame.height);
    std::vector<float> row(row_size);
    auto out = image.bytes.begin();
    for (int y = 0; y < frame.height; ++y) {
        channels.read(y, 0, frame.width, row.data());
        for (std::size_t i = 0; i < row_size; ++i) {
            const std::size_t window = i % windows.size();
            const float scaled = (row[i] - low[window]) * factor[window];
            // what is not finite marks where nothing was measured
            *out++ = std::isfinite(row[i]) ? static_cast<std::uint8_t>(std::nearbyint(std::clamp(scaled, 0.0F, 255.0F))) : 0;
        }
    }
    return image;
}

}  // namespace darcnn
