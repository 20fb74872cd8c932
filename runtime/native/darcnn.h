/* libdarcnn: finds the objects of camera frames with a darcnn bundle, from C and C++.
 *
 * No exception crosses this border, nothing is printed, and no file is read but the bundle and TensorRT's engine_dir.
 * Every call that can fail returns a darcnn_status; darcnn_last_error() then has one line on what was wrong and how
 * to fix it.
 *
 * Threads: any number may call darcnn_segment with the same model at once. The network runs one batch of tiles after
 * another, the rest side by side. A result belongs to who asked for it; reading one from several threads is safe.
 * A handle must not be freed while another thread still uses it.
 */
#ifndef DARCNN_H
#define DARCNN_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && defined(DARCNN_BUILD)
#define DARCNN_API __declspec(dllexport)
#elif defined(_WIN32)
#define DARCNN_API __declspec(dllimport)
#else
#define DARCNN_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct darcnn_model darcnn_model;   /* an open bundle, ready to run */
typedef struct darcnn_result darcnn_result; /* the objects of one frame */

typedef enum {
    DARCNN_OK = 0,
    DARCNN_ERROR_ARGUMENT = 1, /* a mistake of the calling program: null pointer, wrong size, stride or option */
    DARCNN_ERROR_BUNDLE = 2,   /* the bundle is missing, damaged, or made by a newer darcnn */
    DARCNN_ERROR_INPUT = 3,    /* the frame does not fit the model: channels, pixel size, range of its values */
    DARCNN_ERROR_ENGINE = 4,   /* OpenVINO or TensorRT failed, or was not built in */
    DARCNN_ERROR_MEMORY = 5,
    DARCNN_ERROR_INTERNAL = 6  /* a bug of this library */
} darcnn_status;

typedef enum { DARCNN_UINT8 = 0, DARCNN_UINT16 = 1, DARCNN_FLOAT32 = 2 } darcnn_pixel_type;

/* How a model is opened; darcnn_default_open_options fills it. */
typedef struct {
    const char *engine;     /* NULL or "openvino" (a CPU), or "tensorrt" (an NVIDIA GPU, where built in) */
    const char *engine_dir; /* TensorRT: the folder that darcnn-export engine wrote; else NULL */
    int32_t threads;        /* OpenVINO: at most, of the network; 0: OpenVINO chooses */
} darcnn_open_options;

/* What a model is. The strings live as long as the model. */
typedef struct {
    const char *name;
    const char *engine;         /* what runs it, with its version */
    int32_t channels;           /* 1 to 4 */
    int32_t tile_px;            /* the network sees squares of so many pixels */
    double nominal_diameter_px; /* of the objects that it knows best, in network pixels */
    double mpp;                 /* micrometres per network pixel; 0: it knows none */
    double min_score;           /* of what is reported, unless darcnn_options asks for another */
} darcnn_info;

/* A frame in the memory of the caller, who may reuse it once darcnn_segment has returned. Channels are interleaved. */
typedef struct {
    const void *pixels;       /* first row, first pixel; aligned for its type */
    size_t size_bytes;        /* of the memory at `pixels`; nothing beyond is read */
    size_t row_stride_bytes;  /* from one row to the next, aligned too; at least a row's own pixels */
    int32_t width, height;    /* pixels, 1 to 65536 */
    int32_t channels;         /* 1 to 64 */
    darcnn_pixel_type type;
    int32_t is_rgb;           /* not 0: red, green, blue, and perhaps alpha, which is left out */
} darcnn_frame;

/* How a frame is read; darcnn_default_options fills it. Where neither a diameter nor a pixel size is given, the pixels
 * are taken as they are. Where both are, the diameter decides. */
typedef struct {
    double diameter_px;  /* of a typical object, in pixels of the frame; 0: not given */
    double mpp;          /* micrometres per pixel of the frame; 0: not given. A model without one ignores it */
    double window_low;   /* these raw values become black and white, in every channel; both 0: the model's own */
    double window_high;  /*   rule, which may look at the brightness of each frame */
    double min_score;    /* 0 to 1, objects below it are not reported; negative: the model's own */
    int32_t channel;     /* which of several channels; negative: colours, the only one, or as many as the model sees */
} darcnn_options;

/* One object, in pixels of the frame; the pixel in column i covers [i, i + 1). The pointers live as long as the result. */
typedef struct {
    float x0, y0, x1, y1;           /* its box, cut to the frame */
    float score;                    /* 0..1 */
    int32_t is_truncated;           /* not 0: it is larger than the network's field, and goes on */
    int32_t mask_x, mask_y;         /* where the mask's first pixel lies on the frame */
    int32_t mask_width, mask_height;
    const uint8_t *mask;            /* mask_height rows of mask_width bytes: 1 inside, 0 outside */
    const double *outline;          /* n_outline points x y, a closed ring: the first is repeated at the end */
    size_t n_outline;
} darcnn_object;

DARCNN_API void darcnn_default_open_options(darcnn_open_options *options);
DARCNN_API void darcnn_default_options(darcnn_options *options);

/* Open and verify the bundle at `path` (UTF-8) and make its network ready, some seconds. The file is not needed
 * afterwards. `options` may be NULL. On failure *model is NULL. */
DARCNN_API darcnn_status darcnn_open(const char *path, const darcnn_open_options *options, darcnn_model **model);
DARCNN_API darcnn_status darcnn_model_info(const darcnn_model *model, darcnn_info *info);

/* Find the objects of a frame; waits until it is done. `options` may be NULL. On failure *result is NULL,
 * and the model can go on with the next frame. */
DARCNN_API darcnn_status darcnn_segment(darcnn_model *model, const darcnn_frame *frame, const darcnn_options *options,
                                        darcnn_result **result);
DARCNN_API size_t darcnn_result_count(const darcnn_result *result); /* 0 for NULL */
DARCNN_API darcnn_status darcnn_result_object(const darcnn_result *result, size_t index, darcnn_object *object);

/* Draw the label image, row after row: 0 background, n + 1 for object n; where objects overlap, the higher score wins,
 * and of equal ones the first object. `n_labels` must be width x height of the frame. */
DARCNN_API darcnn_status darcnn_result_labels(const darcnn_result *result, int32_t *labels, size_t n_labels);

/* NULL is allowed and does nothing. */
DARCNN_API void darcnn_result_free(darcnn_result *result);
DARCNN_API void darcnn_free(darcnn_model *model);

/* What was wrong in the last call of this thread that failed; "" before any did. Valid until its next call. */
DARCNN_API const char *darcnn_last_error(void);

#ifdef __cplusplus
}
#endif
#endif
