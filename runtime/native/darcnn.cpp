// The C border: null pointers are refused here, and every exception becomes a code and a message.
#include "darcnn.h"

#include <algorithm>
#include <cstdio>
#include <new>

#include "segmenter.hpp"

struct darcnn_model : darcnn::Model {};

struct darcnn_result {
    int width, height;  // of the frame
    std::vector<darcnn::Object> objects;
};

namespace {

constexpr const char *kReport = "; this is a bug of libdarcnn: report it";
thread_local char last_error[1024] = "";  // plain memory: it needs no destructor when a thread or the library goes

darcnn_status fail(darcnn_status status, const char *message, const char *fix = "") noexcept {
    std::snprintf(last_error, sizeof last_error, "%s%s", message, fix);
    for (char *c = last_error; *c; ++c)
        if (static_cast<unsigned char>(*c) < ' ') *c = ' ';  // one line
    return status;
}

template <typename Function>
darcnn_status guard(Function function) noexcept {
    try {
        function();
        return DARCNN_OK;
    } catch (const darcnn::Error &err) {
        return fail(err.status, err.what());
    } catch (const std::bad_alloc &) {
        return fail(DARCNN_ERROR_MEMORY, "memory: there is not enough; segment a smaller frame");
    } catch (const std::exception &err) {
        return fail(DARCNN_ERROR_INTERNAL, err.what(), kReport);
    } catch (...) {
        return fail(DARCNN_ERROR_INTERNAL, "an exception of unknown type", kReport);
    }
}

[[noreturn]] void refuse(const char *where, const std::string &problem, const char *fix) {
    throw darcnn::Error(DARCNN_ERROR_ARGUMENT, where, problem, fix);
}

void demand(std::initializer_list<std::pair<const void *, const char *>> pointers) {
    for (const auto &[pointer, name] : pointers)
        if (!pointer) refuse(name, "is a null pointer", "give an address");
}

std::unique_ptr<darcnn::Engine> open_engine(const darcnn::Bundle &bundle, const darcnn_open_options &options) {
    const std::string engine = options.engine ? options.engine : "openvino";
    if (options.threads < 0) refuse("options", "threads is negative", "give 0 or more");
    if (engine == "openvino") return darcnn::open_openvino(bundle, options.threads);
    if (engine != "tensorrt") refuse("options", "no engine " + engine, "choose openvino or tensorrt");
#ifdef DARCNN_WITH_TENSORRT
    demand({{options.engine_dir, "options.engine_dir"}});
    return darcnn::open_tensorrt(bundle, options.engine_dir);
#else
    throw darcnn::Error(DARCNN_ERROR_ENGINE, "options", "TensorRT was not built in", "configure with -DDARCNN_TENSORRT=ON");
#endif
}

}  // namespace

void darcnn_default_open_options(darcnn_open_options *options) {
    if (options) *options = {"openvino", nullptr, 0};
}

void darcnn_default_options(darcnn_options *options) {
    if (options) *options = {0, 0, 0, 0, -1, -1};
}

darcnn_status darcnn_open(const char *path, const darcnn_open_options *options, darcnn_model **model) {
    if (model) *model = nullptr;
    return guard([&] {
        demand({{path, "path"}, {model, "model"}});
        darcnn_open_options chosen;
        darcnn_default_open_options(&chosen);
        if (options) chosen = *options;
        const darcnn::Bundle bundle(path);
        *model = new darcnn_model{{bundle.manifest, open_engine(bundle, chosen), {}}};
    });
}

darcnn_status darcnn_model_info(const darcnn_model *model, darcnn_info *info) {
    return guard([&] {
        demand({{model, "model"}, {info, "info"}});
        const darcnn::Manifest &m = model->manifest;
        *info = {m.name.c_str(), model->engine->name.c_str(), m.channels, m.tile_px,
                 m.nominal_diameter_px, m.mpp.value_or(0), m.min_score};
    });
}

darcnn_status darcnn_segment(darcnn_model *model, const darcnn_frame *frame, const darcnn_options *options,
                             darcnn_result **result) {
    if (result) *result = nullptr;
    return guard([&] {
        demand({{model, "model"}, {frame, "frame"}, {result, "result"}});
        darcnn_options chosen;
        darcnn_default_options(&chosen);
        if (options) chosen = *options;
        *result = new darcnn_result{frame->width, frame->height, segment(*model, *frame, chosen)};
    });
}

size_t darcnn_result_count(const darcnn_result *result) { return result ? result->objects.size() : 0; }

darcnn_status darcnn_result_object(const darcnn_result *result, size_t index, darcnn_object *object) {
    return guard([&] {
        demand({{result, "result"}, {object, "object"}});
        const std::size_t n = result->objects.size();
        if (index >= n) refuse("index", "there are " + std::to_string(n) + " objects", "count them with darcnn_result_count");
        const darcnn::Object &o = result->objects[index];
        *object = {o.x0, o.y0, o.x1, o.y1, o.score, o.is_truncated ? 1 : 0, o.mask_x, o.mask_y,
                   o.mask_width, o.mask_height, o.mask.data(), o.outline.data(), o.outline.size() / 2};
    });
}

darcnn_status darcnn_result_labels(const darcnn_result *result, int32_t *labels, size_t n_labels) {
    return guard([&] {
        demand({{result, "result"}, {labels, "labels"}});
        const std::size_t n = static_cast<std::size_t>(result->width) * result->height;
        if (n_labels != n) refuse("n_labels", "the frame has " + std::to_string(n) + " pixels", "give one label for each");
        std::fill_n(labels, n, 0);
        darcnn::draw_labels(result->objects, result->width, labels);
    });
}

void darcnn_result_free(darcnn_result *result) { delete result; }

void darcnn_free(darcnn_model *model) { delete model; }

const char *darcnn_last_error(void) { return last_error; }
