// Runs the two graphs with OpenVINO, on a CPU.
#include <cstring>
#include <openvino/openvino.hpp>
#include <openvino/opsets/opset8.hpp>

#include "engine.hpp"

namespace darcnn {
namespace {

namespace ops = ov::opset8;

constexpr const char *kDevice = "CPU";

std::string shorten(const std::exception &error) { return std::string(error.what()).substr(0, 200); }

template <typename Function>
auto ask_openvino(Function function) {
    try {
        return function();
    } catch (const ov::Exception &err) {
        throw Error(DARCNN_ERROR_ENGINE, kDevice, "OpenVINO failed (" + shorten(err) + ")", "free memory, or reinstall it");
    }
}

std::string type_name(const ov::element::Type &type) {
    if (type == ov::element::u8) return "uint8";
    if (type == ov::element::f32) return "float32";
    if (type == ov::element::i64) return "int64";
    return type == ov::element::boolean ? "bool" : type.get_type_name();
}

Signature signature_of(const ov::CompiledModel &model) {
    Signature found;
    for (const auto &ports : {model.inputs(), model.outputs()})
        for (const auto &port : ports)
            found[port.get_any_name()] = describe_tensor(type_name(port.get_element_type()), port.get_shape());
    return found;
}

template <typename T>
std::vector<T> copy_out(ov::InferRequest &request, const char *name) {
    const ov::Tensor tensor = request.get_tensor(name);
    const T *start = static_cast<const T *>(tensor.data());
    return {start, start + tensor.get_size()};
}

template <typename T>
void copy_in(ov::InferRequest &request, const char *name, const std::vector<T> &values) {
    ov::Tensor tensor = request.get_tensor(name);  // of the size that check_signature asked for
    std::memcpy(tensor.data(), values.data(), tensor.get_byte_size());
}

// Pooling, a weighted sum of rows of the atlas for each cell, as one operation; openvino_pooling.py does the same.
void fuse_pooling(const ov::Model &model) {
    const auto reshape = [](const auto &given, const ov::Shape &shape) {
        return std::make_shared<ops::Reshape>(given, ops::Constant::create(ov::element::i64, {shape.size()}, shape), false);
    };
    for (const auto &node : model.get_ordered_ops()) {
        const auto product = ov::as_type_ptr<ops::MatMul>(node);
        const auto rows = product ? ov::as_type_ptr<ops::Reshape>(product->get_input_node_shared_ptr(1)) : nullptr;
        const auto gather = rows ? ov::as_type_ptr<ops::Gather>(rows->get_input_node_shared_ptr(0)) : nullptr;
        if (!gather || gather->get_axis() != 0 || product->get_transpose_a() || product->get_transpose_b()) continue;
        const ov::Shape sizes = rows->get_shape(), table = gather->get_input_shape(0), weights = product->get_input_shape(0);
        if (sizes.size() != 3 || table.size() != 2 || table[1] != sizes[2] || weights != ov::Shape{sizes[0], 1, sizes[1]}) continue;
        const ov::Shape bags = {sizes[0], sizes[1]};
        const auto indices = reshape(gather->input_value(1), bags), factors = reshape(product->input_value(0), bags);
        const auto pooled = std::make_shared<ops::EmbeddingBagPackedSum>(gather->input_value(0), indices, factors);
        product->output(0).replace(reshape(pooled, product->get_shape())->output(0));
    }
}

class OpenVinoEngine final : public Engine {
  public:
    OpenVinoEngine(const Bundle &bundle, int threads)
        : detect_(compile(bundle, "detect", threads)), mask_(compile(bundle, "mask", threads)) {
        const std::string build = ov::get_openvino_version().buildNumber;
        name = "openvino " + build.substr(0, build.find('-')) + " " + kDevice;
        mask_.set_tensor("atlas", detect_.get_tensor("atlas"));  // one memory: it is never copied
    }

    Detections detect(const std::vector<std::uint8_t> &tiles) override {
        copy_in(detect_, "tile", tiles);
        ask_openvino([&] { detect_.infer(); });
        return {copy_out<float>(detect_, "boxes"), copy_out<float>(detect_, "scores"),
                copy_out<std::uint8_t>(detect_, "converged")};
    }

    std::vector<float> masks(const std::vector<float> &boxes, const std::vector<std::int64_t> &tile_index) override {
        copy_in(mask_, "boxes", boxes);
        copy_in(mask_, "tile_index", tile_index);
        ask_openvino([&] { mask_.infer(); });
        return copy_out<float>(mask_, "masks");
    }

  private:
    ov::InferRequest compile(const Bundle &bundle, const std::string &graph, int threads) {
        // float32 throughout: on CPUs with bfloat16 OpenVINO would take that unasked, and scores would differ
        ov::AnyMap options = {ov::hint::inference_precision(ov::element::f32),
                              ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY)};
        if (threads > 0) options.insert(ov::inference_num_threads(threads));
        const std::string file = graph + ".onnx";
        std::shared_ptr<ov::Model> read;
        try {
            read = core_.read_model(std::string(bundle.members.at(file)), ov::Tensor());
        } catch (const ov::Exception &err) {
            throw Error(DARCNN_ERROR_BUNDLE, bundle.path, "OpenVINO cannot read " + file + " (" + shorten(err) + ")",
                        "build libdarcnn with a newer openvino");
        }
        fuse_pooling(*read);
        ov::CompiledModel model = core_.compile_model(read, kDevice, options);
        try {
            check_signature(bundle.manifest, graph, file, signature_of(model));
        } catch (const JsonError &err) {
            throw Error(DARCNN_ERROR_BUNDLE, bundle.path, err.what(), "export the model again");
        }
        return model.create_infer_request();
    }

    ov::Core core_;
    ov::InferRequest detect_, mask_;
};

}  // namespace

std::unique_ptr<Engine> open_openvino(const Bundle &bundle, int threads) {
    return ask_openvino([&] { return std::make_unique<OpenVinoEngine>(bundle, threads); });
}

}  // namespace darcnn
