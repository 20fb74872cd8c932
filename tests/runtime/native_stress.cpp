// Run under AddressSanitizer and ThreadSanitizer by test_native.py: many threads on one model, good frames and bad calls.
//
//   native_stress BUNDLE FRAMES WIDTH HEIGHT     (uint8, one channel)
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "darcnn.h"

namespace {

constexpr int kThreads = 3;

struct Job {
    darcnn_model *model;
    std::vector<char> pixels;
    int width, height;
    std::size_t n_frames;

    darcnn_frame frame(std::size_t index) const {
        const std::size_t size = static_cast<std::size_t>(width) * height;
        return {pixels.data() + size * index, size, static_cast<std::size_t>(width), width, height, 1, DARCNN_UINT8, 0};
    }
};

// A number that stands for all that was found on a frame.
double digest(const darcnn_result *result) {
    double sum = 0;
    for (std::size_t i = 0; i < darcnn_result_count(result); ++i) {
        darcnn_object o;
        if (darcnn_result_object(result, i, &o) != DARCNN_OK) return -1;
        sum += o.score + o.x0 + 2 * o.y0 + 3 * o.x1 + 4 * o.y1;
        for (int k = 0; k < o.mask_width * o.mask_height; ++k) sum += o.mask[k];
        for (std::size_t k = 0; k < 2 * o.n_outline; ++k) sum += o.outline[k];
    }
    return sum;
}

double segment(const Job &job, std::size_t index) {
    const darcnn_frame frame = job.frame(index);
    darcnn_result *result = nullptr;
    if (darcnn_segment(job.model, &frame, nullptr, &result) != DARCNN_OK) return -1;
    const double found = digest(result);
    darcnn_result_free(result);
    return found;
}

// Each thread has its own last error.
bool refuses(const Job &job, int thread) {
    darcnn_frame frame = job.frame(0);
    frame.row_stride_bytes = static_cast<std::size_t>(thread);
    darcnn_result *result = nullptr;
    const darcnn_status status = darcnn_segment(job.model, &frame, nullptr, &result);
    const std::string wanted = "row_stride_bytes is " + std::to_string(thread) + ",";
    return status == DARCNN_ERROR_ARGUMENT && !result && std::strstr(darcnn_last_error(), wanted.c_str());
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    Job job{nullptr, {}, std::atoi(argv[3]), std::atoi(argv[4]), 0};
    std::ifstream file(argv[2], std::ios::binary);
    job.pixels.assign(std::istreambuf_iterator<char>(file), {});
    job.n_frames = job.pixels.size() / (static_cast<std::size_t>(job.width) * job.height);
    if (darcnn_open("no such bundle", nullptr, &job.model) != DARCNN_ERROR_BUNDLE || job.model) return 3;
    if (darcnn_open(argv[1], nullptr, &job.model) != DARCNN_OK) {
        std::fprintf(stderr, "%s\n", darcnn_last_error());
        return 4;
    }
    std::vector<double> expected;
    for (std::size_t i = 0; i < job.n_frames; ++i) expected.push_back(segment(job, i));
    std::atomic<int> n_wrong{0};
    std::vector<std::thread> threads;
    for (int t = 1; t <= kThreads; ++t) {
        threads.emplace_back([&, t] {
            for (std::size_t i = 0; i < job.n_frames; ++i) {
                const std::size_t mine = (i + t) % job.n_frames;
                if (!refuses(job, t)) ++n_wrong;
                if (segment(job, mine) != expected[mine]) ++n_wrong;
            }
        });
    }
    for (std::thread &thread : threads) thread.join();
    darcnn_free(job.model);
    double all = 0;
    for (const double found : expected) all += found;
    std::printf("%d threads, %zu frames, %d wrong, digest %.6f\n", kThreads, job.n_frames, n_wrong.load(), all);
    return n_wrong || all <= 0;
}
