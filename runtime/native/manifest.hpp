// What a bundle says of itself; darcnn.runtime.manifest has the fields' meaning.
#pragma once

#include <optional>

#include "json.hpp"

namespace darcnn {

constexpr int kFormat = 1;  // the newest bundle format this version reads

using Signature = std::map<std::string, std::string>;  // tensor -> "float32 [1, 256, 4]"

struct Manifest {
    int tile_px, halo_px, batch, channels, detections, mask_batch, mask_px;
    std::string intensity;  // "full_range", "percentile" or "range"
    double intensity_low, intensity_high, nominal_diameter_px, nms_threshold, min_score;
    std::optional<double> mpp, max_diameter_px;
    std::map<std::string, Signature> graphs;   // "detect", "mask"
    std::map<std::string, std::string> files;  // member -> sha256
};

// Throws JsonError, naming the field, where one is missing, unknown, of the wrong kind, or makes no sense.
Manifest parse_manifest(const JsonTable &table);

// Throws JsonError, naming the first tensor, where `found` (in `source`) is not what the graph must have by the
// manifest's own sizes.
void check_signature(const Manifest &manifest, const std::string &graph, const std::string &source, const Signature &found);

// "float32 [1, 256, 4]"
template <typename Sizes>
std::string describe_tensor(const std::string &type, const Sizes &sizes) {
    std::string text;
    for (const auto size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
    return type + " [" + text + "]";
}

}  // namespace darcnn
