// Runs compiled engines with TensorRT on an NVIDIA GPU. This file was never compiled against TensorRT, nor run.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include "engine.hpp"

namespace darcnn {
namespace {

constexpr std::uintmax_t kPlanCap = std::uintmax_t{1} << 30;

[[noreturn]] void fail(const std::string &where, const std::string &problem, const std::string &fix) {
    throw Error(DARCNN_ERROR_ENGINE, where, problem, fix);
}

void check(cudaError_t status) {
    if (status != cudaSuccess) fail("GPU", cudaGetErrorString(status), "free its memory, or use OpenVINO");
}

class Logger final : public nvinfer1::ILogger {
    void log(Severity, nvinfer1::AsciiChar const *) noexcept override {}  // a library prints nothing
};

struct Buffer {
    explicit Buffer(std::size_t size) : size(size) { check(cudaMalloc(&address, size)); }
    ~Buffer() { cudaFree(address); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    const std::size_t size;
    void *address = nullptr;
};
using Buffers = std::map<std::string, std::shared_ptr<Buffer>>;

// One plan on the GPU, with its buffers; those in `shared` belong to another graph too.
class Graph {
  public:
    Graph(nvinfer1::IRuntime &runtime, const std::string &name, const std::string &plan, const std::string &where,
          const Buffers &shared)
        : name_(name), engine_(runtime.deserializeCudaEngine(plan.data(), plan.size())) {
        if (engine_) context_.reset(engine_->createExecutionContext());
        if (!context_) fail(where, "the GPU does not load " + name + ".plan", "build it again on this machine");
        for (int i = 0; i < engine_->getNbIOTensors(); ++i) {
            const char *tensor = engine_->getIOTensorName(i);
            const nvinfer1::Dims dims = engine_->getTensorShape(tensor);
            const auto [type, item] = describe(engine_->getTensorDataType(tensor));
            const std::vector<long long> shape(dims.d, dims.d + dims.nbDims);
            signature[tensor] = describe_tensor(type, shape);
            std::size_t size = item;
            for (const long long side : shape) size *= static_cast<std::size_t>(side);
            const auto found = shared.find(tensor);
            buffers[tensor] = found == shared.end() ? std::make_shared<Buffer>(size) : found->second;
            if (!context_->setTensorAddress(tensor, buffers[tensor]->address)) fail("GPU", "TensorRT refused a buffer", kAgain);
        }
    }

    template <typename T>
    void copy_in(const char *tensor, const std::vector<T> &values) {  // their sizes are those of check_signature
        check(cudaMemcpy(buffers.at(tensor)->address, values.data(), buffers.at(tensor)->size, cudaMemcpyHostToDevice));
    }

    void run() {
        if (!context_->enqueueV3(cudaStreamPerThread)) fail("GPU", "TensorRT failed on the " + name_ + " graph", kAgain);
        check(cudaStreamSynchronize(cudaStreamPerThread));
    }

    template <typename T>
    std::vector<T> copy_out(const char *tensor) {
        const Buffer &buffer = *buffers.at(tensor);
        std::vector<T> values(buffer.size / sizeof(T));
        check(cudaMemcpy(values.data(), buffer.address, buffer.size, cudaMemcpyDeviceToHost));
        return values;
    }

    Signature signature;
    Buffers buffers;

  private:
    static constexpr const char *kAgain = "free its memory, or use OpenVINO";

    static std::pair<std::string, std::size_t> describe(nvinfer1::DataType type) {
        if (type == nvinfer1::DataType::kFLOAT) return {"float32", 4};
        if (type == nvinfer1::DataType::kINT64) return {"int64", 8};
        return {type == nvinfer1::DataType::kUINT8 ? "uint8" : type == nvinfer1::DataType::kBOOL ? "bool" : "unknown", 1};
    }

    std::string name_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

class TensorRtEngine final : public Engine {
  public:
    TensorRtEngine(const Bundle &bundle, const std::string &folder) : runtime_(nvinfer1::createInferRuntime(logger_)) {
        if (!runtime_) fail("GPU", "TensorRT does not start", "check the driver, or use OpenVINO");
        const std::string rebuild = "build it again with `darcnn-export engine --backend tensorrt`";
        Buffers shared;  // the atlas stays on the GPU
        try {
            JsonTable facts = parse_json(read_file(folder + "/engine.json", kPlanCap));
            name = "tensorrt " + facts["facts/version"].text;
            if (facts["facts/bundle_sha256"].text != sha256(bundle.content)) fail(folder, "was made of another bundle", rebuild);
            for (const std::string graph : {"detect", "mask"}) {
                const std::string plan = read_file(folder + "/" + graph + ".plan", kPlanCap);
                if (facts["plans/" + graph].text != sha256(plan)) fail(folder, graph + ".plan is damaged", rebuild);
                // plans that later versions run too bring code along, which is run only if allowed
                if (facts["facts/is_version_compatible"].number != 0) runtime_->setEngineHostCodeAllowed(true);
                auto loaded = std::make_unique<Graph>(*runtime_, graph, plan, folder, shared);
                check_signature(bundle.manifest, graph, graph + ".plan", loaded->signature);
                shared = {{"atlas", loaded->buffers.at("atlas")}};
                (graph == "detect" ? detect_ : mask_) = std::move(loaded);
            }
        } catch (const JsonError &err) {
            fail(folder, err.what(), rebuild);
        }
    }

    Detections detect(const std::vector<std::uint8_t> &tiles) override {
        detect_->copy_in("tile", tiles);
        detect_->run();
        return {detect_->copy_out<float>("boxes"), detect_->copy_out<float>("scores"),
                detect_->copy_out<std::uint8_t>("converged")};
    }

    std::vector<float> masks(const std::vector<float> &boxes, const std::vector<std::int64_t> &tile_index) override {
        mask_->copy_in("boxes", boxes);
        mask_->copy_in("tile_index", tile_index);
        mask_->run();
        return mask_->copy_out<float>("masks");
    }

  private:
    Logger logger_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;  // outlives its engines
    std::unique_ptr<Graph> detect_, mask_;
};

}  // namespace

std::unique_ptr<Engine> open_tensorrt(const Bundle &bundle, const std::string &engine_dir) {
    return std::make_unique<TensorRtEngine>(bundle, engine_dir);
}

}  // namespace darcnn
