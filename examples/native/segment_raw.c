/* Feeds the frames of a raw file (pixels only, one frame after another) to libdarcnn, as a camera would.
 *
 *   segment_raw BUNDLE FRAMES WIDTH HEIGHT uint8|uint16|float32 [DIAMETER_PX]
 *
 * One line a frame, and of the first frame its best objects. The sizes are those of one-channel frames.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "darcnn.h"

#define SHOWN 3 /* objects of the first frame */

static int complain(const char *what) {
    fprintf(stderr, "%s: %s\n", what, darcnn_last_error());
    return 1;
}

static double now_ms(void) {
    struct timespec time;
    timespec_get(&time, TIME_UTC);
    return 1e3 * (double)time.tv_sec + 1e-6 * (double)time.tv_nsec;
}

static int show(const darcnn_result *result, int is_first, int index, double ms) {
    size_t i, n = darcnn_result_count(result);
    printf("frame %d: %zu objects in %.0f ms\n", index, n, ms);
    for (i = 0; is_first && i < n && i < SHOWN; ++i) {
        darcnn_object object;
        if (darcnn_result_object(result, i, &object) != DARCNN_OK) return complain("object");
        printf("  score %.3f, box %.1f %.1f %.1f %.1f, mask %d x %d at %d %d, outline of %zu points\n", object.score, object.x0,
               object.y0, object.x1, object.y1, object.mask_width, object.mask_height, object.mask_x, object.mask_y,
               object.n_outline);
    }
    return 0;
}

static int run(darcnn_model *model, FILE *file, darcnn_frame *frame, const darcnn_options *options, void *pixels) {
    int index, failed = 0;
    for (index = 0; fread(pixels, 1, frame->size_bytes, file) == frame->size_bytes; ++index) {
        darcnn_result *result;
        const double start = now_ms();
        if (darcnn_segment(model, frame, options, &result) != DARCNN_OK) {
            failed = complain("frame"); /* that frame's error: the next one goes on */
            continue;
        }
        failed |= show(result, index == 0, index, now_ms() - start);
        darcnn_result_free(result);
    }
    if (index == 0) fprintf(stderr, "the file holds no whole frame\n");
    return failed || index == 0;
}

int main(int argc, char **argv) {
    static const char *const names[] = {"uint8", "uint16", "float32"};
    darcnn_frame frame;
    darcnn_options options;
    darcnn_model *model;
    FILE *file;
    void *pixels;
    int failed;
    if (argc < 6 || argc > 7) {
        fprintf(stderr, "usage: %s BUNDLE FRAMES WIDTH HEIGHT uint8|uint16|float32 [DIAMETER_PX]\n", argv[0]);
        return 2;
    }
    memset(&frame, 0, sizeof frame);
    while (frame.type <= DARCNN_FLOAT32 && strcmp(argv[5], names[frame.type]) != 0) ++frame.type;
    frame.width = atoi(argv[3]);
    frame.height = atoi(argv[4]);
    if (frame.type > DARCNN_FLOAT32 || frame.width < 1 || frame.height < 1) {
        fprintf(stderr, "%s x %s pixels of %s: no such frame\n", argv[3], argv[4], argv[5]);
        return 2;
    }
    frame.channels = 1;
    frame.row_stride_bytes = (size_t)frame.width << frame.type; /* 1, 2 or 4 bytes a pixel */
    frame.size_bytes = frame.row_stride_bytes * (size_t)frame.height;
    darcnn_default_options(&options);
    if (argc == 7) options.diameter_px = atof(argv[6]);

    file = fopen(argv[2], "rb");
    if (!file) {
        fprintf(stderr, "%s: %s\n", argv[2], strerror(errno));
        return 2;
    }
    if (darcnn_open(argv[1], NULL, &model) != DARCNN_OK) {
        fclose(file);
        return complain("open");
    }
    frame.pixels = pixels = malloc(frame.size_bytes);
    failed = pixels ? run(model, file, &frame, &options, pixels) : 1;
    free(pixels);
    darcnn_free(model);
    fclose(file);
    return failed;
}
