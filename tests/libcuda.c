/* A CUDA driver that only remembers the parameters of the last launch, so that Triton's own launcher runs without a GPU.
   A tensor map's bytes are its base, rank and strides. */
#include <stdint.h>
#include <string.h>

static uint8_t taken[64][128];
static int sizes[64], count;

void expect(int n, const int *bytes) { count = n; memcpy(sizes, bytes, n * sizeof *bytes); memset(taken, 0, sizeof taken); }
const uint8_t *parameter(int i) { return taken[i]; }

struct config { unsigned grid[3], block[3], shared; void *stream; };

int cuLaunchKernelEx(const struct config *config, void *function, void **parameters, void **extra) {
    for (int i = 0; i < count; i++) memcpy(taken[i], parameters[i], sizes[i]);
    memcpy(taken[count], config, 24);
    return 0;
}
int cuTensorMapEncodeTiled(uint8_t *map, int type, unsigned rank, void *base, const uint64_t *dims, const uint64_t *strides,
                           const unsigned *box, const unsigned *steps, int interleave, int swizzle, int l2, int fill) {
    memset(map, 0, 128);
    memcpy(map, &base, 8);
    memcpy(map + 8, &type, 4), memcpy(map + 12, &rank, 4), memcpy(map + 16, &swizzle, 4), memcpy(map + 20, &fill, 4);
    memcpy(map + 24, dims, 8 * rank), memcpy(map + 64, strides, 8 * (rank - 1)), memcpy(map + 96, box, 4 * rank);
    return 0;
}
int cuPointerGetAttribute(uint64_t *out, int attribute, uint64_t pointer) { *out = pointer; return 0; }
int cuPointerGetAttributes(unsigned n, int *attributes, uint64_t **out, uint64_t pointer) {
    for (unsigned i = 0; i < n; i++) *out[i] = pointer;
    return 0;
}
int cuCtxGetCurrent(void **context) { *context = taken; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "no error"; return 0; }

#define UNUSED(name) int name() { return 0; }
UNUSED(cuInit) UNUSED(cuDriverGetVersion) UNUSED(cuDeviceGet) UNUSED(cuDeviceGetAttribute) UNUSED(cuCtxSetCurrent)
UNUSED(cuDevicePrimaryCtxRetain) UNUSED(cuFuncSetAttribute) UNUSED(cuFuncGetAttribute) UNUSED(cuFuncSetCacheConfig)
UNUSED(cuModuleLoadData) UNUSED(cuModuleGetFunction) UNUSED(cuModuleUnload) UNUSED(cuCtxGetLimit) UNUSED(cuCtxSetLimit)
UNUSED(cuOccupancyMaxActiveClusters) UNUSED(cuTensorMapEncodeIm2col) UNUSED(cuLaunchKernel) UNUSED(cuCtxGetDevice)
UNUSED(cuStreamIsCapturing) UNUSED(cuStreamGetCaptureInfo) UNUSED(cuDevicePrimaryCtxGetState) UNUSED(cuMemcpyDtoH_v2)
