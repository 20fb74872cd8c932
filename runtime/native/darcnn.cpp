// The C border: null pointers are refused here, and every exception becomes a code and a message.
#include "darcnn.h"

#include <cstdio>
#include <new>

#include "segmenter.hpp"

struct darcnn_model {
    darcnn::Segmenter segmenter;
};

struct darcnn_result {
    std::vector<darcnn::Object> objects;
};

namespace {

thread_local char last_error[1024] = "";  // plain memory: it needs no destructor when a thread or the library goes

darcnn_status fail(darcnn_status status, const char *message) noexcept {
    std::snprintf(last_error, sizeof last_error, "%s", message);
    for (char *c = last_error; *c; ++c) {
        if (static_cast<unsigned char>(*c) < ' ') *c = ' ';  // one line
    }
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
        return fail(DARCNN_ERROR_INTERNAL, err.what());
    } catch (...) {
        return fail(DARCNN_ERROR_INTERNAL, "an exception of unknown type");
    }
}

void demand(const void *pointer, const char *name) {
    if (!pointer) throw darcnn::Error(DARCNN_ERROR_ARGUMENT, name, "is a null pointer", "give an address");
}

std::unique_ptr<darcnn::Engine> open_engine(const darcnn::Bundle &bundle, const darcnn_open_options &options) {
    const std::string engine = options.engine ? options.engine : "openvino";
    const auto refuse = [](darcnn_status status, const std::string &what, const char *fix) {
        throw darcnn::Error(status, "options", what, fix);
    };
    if (options.threads < 0) refuse(DARCNN_ERROR_ARGUMENT, "threads is negative", "give 0 or more");
    if (engine == "openvino") return darcnn::open_openvino(bundle, options.threads);
    if (engine != "tensorrt") refuse(DARCNN_ERROR_ARGUMENT, "no engine " + engine, "choose openvino or tensorrt");
#ifdef DARCNN_WITH_TENSORRT
    demand(options.engine_dir, "options.engine_dir");
    return darcnn::open_tensorrt(bundle, options.engine_dir);
#else
    refuse(DARCNN_ERROR_ENGINE, "TensorRT was not built in", "configure with -DDARCNN_TENSORRT=ON");
    return nullptr;
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
        demand(path, "path");
        demand(model, "model");
        darcnn_open_options chosen;
        darcnn_default_open_options(&chosen);
        if (options) chosen = *options;
        const darcnn::Bundle bundle(path);
        *model = new darcnn_model{{bundle.manifest(), open_engine(bundle, chosen)}};
    });
}

darcnn_status darcnn_segment(darcnn_model *model, const darcnn_frame *frame, const darcnn_options *options,
                             darcnn_result **result) {
    if (result) *result = nullptr;
    return guard([&] {
        demand(model, "model");
        demand(frame, "frame");
        demand(result, "result");
        darcnn_options chosen;
        darcnn_default_options(&chosen);
        if (options) chosen = *options;
        *result = new darcnn_result{model->segmenter.segment(*frame, chosen)};
    });
}

size_t darcnn_result_count(const darcnn_result *result) { return result ? result->objects.size() : 0; }

darcnn_status darcnn_result_object(const darcnn_result *result, size_t index, darcnn_object *object) {
    return guard([&] {
        demand(result, "result");
        demand(object, "object");
        if (index >= result->objects.size()) {
            const std::string problem = "there are " + std::to_string(result->objects.size()) + " objects";
            throw darcnn::Error(DARCNN_ERROR_ARGUMENT, "index", problem, "count them with darcnn_result_count");
        }
        const darcnn::Object &o = result->objects[index];
        *object = {o.x0, o.y0, o.x1, o.y1, o.score, o.is_truncated ? 1 : 0, o.mask_x, o.mask_y,
                   o.mask_width, o.mask_height, o.mask.data(), o.outline.data(), o.outline.size() / 2};
    });
}

void darcnn_result_free(darcnn_result *result) { delete result; }

void darcnn_free(darcnn_model *model) { delete model; }

const char *darcnn_last_error(void) { return last_error; }
