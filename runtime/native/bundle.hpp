// A model in one file, verified; darcnn.runtime.bundle refuses the same.
#pragma once

#include <cstdint>
#include <optional>

#include "darcnn.h"
#include "json.hpp"

namespace darcnn {

constexpr int kFormat = 1;  // the newest bundle format this version reads

using Signature = std::map<std::string, std::string>;  // tensor -> "float32 [1, 256, 4]"

// manifest.json; darcnn.runtime.manifest has the fields' meaning.
struct Manifest {
    std::string name;
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

// The one exception of the library, `where: problem; fix` in one line; it ends at the C border.
struct Error : std::runtime_error {
    Error(darcnn_status status, const std::string &where, const std::string &problem, const std::string &fix)
        : std::runtime_error(where + ": " + problem + "; " + fix), status(status) {}
    darcnn_status status;
};

// Holds the whole file in memory: what happens to it afterwards does not matter.
struct Bundle {
    explicit Bundle(const std::string &file);  // throws Error
    Bundle(const Bundle &) = delete;           // the members point into the content

    const std::string path, content;
    std::map<std::string, std::string_view> members;
    Manifest manifest;
};

// The content of a file of at most `cap` bytes. Throws Error.
std::string read_file(const std::string &path, std::uintmax_t cap);

// SHA-256 (FIPS 180-4), 64 hex digits.
std::string sha256(std::string_view content);

}  // namespace darcnn
