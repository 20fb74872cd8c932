#include "bundle.hpp"

#include <vector>

namespace darcnn {
namespace {

using Kind = Json::Kind;

constexpr int kMaxSide = 8192;    // network pixels of a tile, cells of a mask
constexpr int kMaxCount = 65536;  // tiles, slots, boxes

// Each field is taken out once; what is left at the end is unknown.
class Fields {
  public:
    explicit Fields(JsonTable table) : rest_(std::move(table)) {}

    bool has(const std::string &path, Kind kind) const {
        const auto found = rest_.find(path);
        return found != rest_.end() && found->second.kind == kind;
    }

    Json take(const std::string &path, Kind kind) {
        const auto found = rest_.extract(path);
        if (!found) throw JsonError("lacks " + path);
        if (found.mapped().kind != kind) throw JsonError(path + " is of the wrong kind");
        return found.mapped();
    }

    double number(const std::string &path, double low, double high) {
        const double value = take(path, Kind::number).number;
        if (!(value >= low && value <= high)) throw JsonError(path + " is out of range");
        return value;
    }

    int whole(const std::string &path, int low, int high) {
        const auto found = rest_.find(path);
        if (found != rest_.end() && !found->second.is_integer) throw JsonError(path + " is not an integer");
        return static_cast<int>(number(path, low, high));
    }

    std::optional<double> size_or_null(const std::string &path, bool may_lack) {
        if (may_lack && !rest_.count(path)) return std::nullopt;
        if (has(path, Kind::null)) return take(path, Kind::null), std::nullopt;
        return number(path, 1e-6, 1e6);
    }

    // The names right below `path`, which is a table.
    std::vector<std::string> names(const std::string &path) {
        std::vector<std::string> found;
        take(path, Kind::object);
        for (const auto &[name, value] : rest_) {
            const bool is_below = name.compare(0, path.size() + 1, path + "/") == 0;
            if (is_below && name.find('/', path.size() + 1) == std::string::npos) found.push_back(name.substr(path.size() + 1));
        }
        return found;
    }

    std::vector<long long> numbers(const std::string &path) {
        std::vector<long long> found;
        const double n = take(path, Kind::array).number;
        for (int i = 0; i < n; ++i) found.push_back(static_cast<long long>(number(path + "/" + std::to_string(i), 0, 1e9)));
        return found;
    }

    void finish() const {
        if (!rest_.empty()) throw JsonError("has an unknown field " + rest_.begin()->first);
    }

  private:
    JsonTable rest_;
};

void parse_input(Fields &fields, Manifest &m) {
    fields.take("input", Kind::object);
    m.tile_px = fields.whole("input/tile_px", 1, kMaxSide);
    m.halo_px = fields.whole("input/halo_px", 0, (m.tile_px - 1) / 2);
    fields.whole("input/stride_px", 1, kMaxSide);
    m.batch = fields.whole("input/batch", 1, kMaxCount);
    m.channels = fields.whole("input/channels", 1, 4);
    fields.take("input/intensity", Kind::object);
    m.intensity = fields.take("input/intensity/kind", Kind::text).text;
    const bool is_full = m.intensity == "full_range", is_percentile = m.intensity == "percentile";
    if (!is_full && !is_percentile && m.intensity != "range") throw JsonError("has an unknown intensity rule " + m.intensity);
    const double lowest = is_percentile ? 0 : -1e38, highest = is_percentile ? 100 : 1e38;
    const std::string low = "input/intensity/low", high = "input/intensity/high";
    if (fields.has(low, Kind::number)) m.intensity_low = fields.number(low, lowest, highest);
    if (fields.has(high, Kind::number)) m.intensity_high = fields.number(high, lowest, highest);
    if (!is_full && m.intensity_low >= m.intensity_high) throw JsonError("input/intensity/high is out of range");
    m.nominal_diameter_px = fields.number("input/nominal_diameter_px", 1e-3, kMaxSide);
    m.mpp = fields.size_or_null("input/mpp", false);
    // Of no use to a frame: it is one plane, and its scale is given.
    const std::pair<const char *, Kind> others[] = {{"input/finds_diameter", Kind::boolean}, {"input/found_diameter_px", Kind::null}, {"input/found_diameter_px", Kind::number}, {"input/slab", Kind::null}, {"precision", Kind::text}};
    for (const auto &[path, kind] : others) if (fields.has(path, kind)) fields.take(path, kind);
    if (fields.has("input/slab", Kind::object)) for (const auto &name : fields.names("input/slab")) fields.number("input/slab/" + name, 0, 1e3);
}

void parse_limits(Fields &fields, Manifest &m) {
    fields.take("limits", Kind::object);
    for (const char *path : {"limits/proposals_per_level", "limits/proposals"}) fields.whole(path, 1, kMaxCount);
    m.detections = fields.whole("limits/detections", 1, kMaxCount);
    m.mask_batch = fields.whole("limits/mask_batch", 1, kMaxCount);
    m.mask_px = fields.whole("limits/mask_px", 1, kMaxSide);
    fields.number("limits/score_threshold", 0, 1);
    m.nms_threshold = fields.number("limits/nms_threshold", 0, 1);
    m.min_score = fields.number("limits/min_score", 0, 1);
    m.max_diameter_px = fields.size_or_null("limits/max_diameter_px", true);
}

std::string state(const std::string &name, const Signature &signature) {
    return signature.count(name) ? name + " " + signature.at(name) : "no " + name;
}

}  // namespace

Manifest parse_manifest(const JsonTable &table) {
    Fields fields(table);
    Manifest m{};
    fields.take("", Kind::object);
    fields.whole("format", 1, kFormat);
    m.name = fields.take("name", Kind::text).text;
    fields.take("preset", Kind::text);
    parse_input(fields, m);
    fields.take("anchors", Kind::object);  // they are inside the graph
    for (const char *path : {"anchors/sizes_px", "anchors/ratios", "anchors/strides_px"}) fields.numbers(path);
    parse_limits(fields, m);
    for (const std::string &graph : fields.names("graphs")) {
        for (const std::string &tensor : fields.names("graphs/" + graph)) {
            const std::string path = "graphs/" + graph + "/" + tensor;
            fields.take(path, Kind::array);
            const std::string type = fields.take(path + "/0", Kind::text).text;
            m.graphs[graph][tensor] = describe_tensor(type, fields.numbers(path + "/1"));
        }
    }
    for (const std::string &name : fields.names("files")) m.files[name] = fields.take("files/" + name, Kind::text).text;
    fields.finish();
    return m;
}

void check_signature(const Manifest &m, const std::string &graph, const std::string &source, const Signature &found) {
    const auto detect = m.graphs.find("detect");
    if (detect == m.graphs.end() || !detect->second.count("atlas")) throw JsonError("manifest.json does not say what atlas is");
    using Sizes = std::vector<int>;
    Signature expected = {{"atlas", detect->second.at("atlas")}};
    const auto expect = [&](auto name, auto type, const Sizes &sizes) { expected[name] = describe_tensor(type, sizes); };
    if (graph == "detect") {
        expect("tile", "uint8", {m.batch, m.tile_px, m.tile_px, m.channels});
        expect("boxes", "float32", {m.batch, m.detections, 4});
        expect("scores", "float32", {m.batch, m.detections});
        expect("converged", "bool", {m.batch});
    } else {
        expect("boxes", "float32", {m.mask_batch, 4});
        expect("tile_index", "int64", {m.mask_batch});
        expect("masks", "float32", {m.mask_batch, m.mask_px, m.mask_px});
    }
    Signature names = expected;
    names.insert(found.begin(), found.end());
    for (const auto &[name, tensor] : names) {
        if (state(name, found) == state(name, expected)) continue;
        throw JsonError(source + " has " + state(name, found) + " in the " + graph +
                        " graph, the model's input and limits ask for " + state(name, expected));
    }
}

}  // namespace darcnn
