#include <algorithm>

#include "kernels/device_codec.cuh"
#include "kernels/device_launch.cuh"
#include "kernels/page_move.h"

namespace pagetide::kernels {
namespace {

constexpr int kWarps = 8;

// A warp moves one token's row of one plane. Grid: x tokens of a page, y pages (strided), z planes
// (strided).
template <PageMoveDirection kDirection>
__global__ void __launch_bounds__(32 * kWarps, 2) PageMoveKernel(PageMoveArgs args) {
  const int64_t row_bytes = args.num_heads * args.head_bytes;
  const int lane = static_cast<int>(threadIdx.x);
  for (int64_t i = blockIdx.y; i < args.num_pages; i += gridDim.y) {
    const PageTokens tokens = args.pages[i];
    for (int32_t p = static_cast<int32_t>(blockIdx.z); p < args.num_planes; p += gridDim.z) {
      const EnginePlane plane = args.planes[p];
      const bool whole = plane.engine_head_bytes == args.head_bytes || args.num_heads == 1;
      const int32_t pieces = whole ? 1 : args.num_heads;
      const int64_t piece_bytes = whole ? row_bytes : args.head_bytes;
      for (int32_t t = static_cast<int32_t>(blockIdx.x * kWarps + threadIdx.y);
           t < tokens.num_tokens; t += gridDim.x * kWarps) {
        const int64_t slot = device::Global(tokens.slots)[t];
        if (slot < 0) continue;
        char* row = device::Global(static_cast<char*>(tokens.page)) + plane.page_offset +
                    (tokens.first_token + t) * row_bytes;
        char* place = device::Global(static_cast<char*>(plane.base)) +
                      slot / args.engine_page_tokens * plane.engine_page_bytes +
                      slot % args.engine_page_tokens * plane.engine_token_bytes;
        for (int32_t h = 0; h < pieces; ++h) {
          char* in_engine = place + h * plane.engine_head_bytes;
          char* in_page = row + h * args.head_bytes;
          if (kDirection == PageMoveDirection::kGather) {
            device::CopyBytes(in_engine, in_page, piece_bytes, lane, 32);
          } else {
            device::CopyBytes(in_page, in_engine, piece_bytes, lane, 32);
          }
        }
      }
    }
  }
}

}  // namespace

int PageMoveCuda(const PageMoveArgs& args, CudaStream stream) {
  if (args.num_pages == 0 || args.num_planes == 0 || args.max_tokens == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((args.max_tokens + kWarps - 1) / kWarps),
                  static_cast<unsigned>(std::min<int64_t>(args.num_pages, 65535)),
                  static_cast<unsigned>(std::min(args.num_planes, 65535)));
  const dim3 block(32, kWarps);
  const auto kernel = args.direction == PageMoveDirection::kGather
                          ? PageMoveKernel<PageMoveDirection::kGather>
                          : PageMoveKernel<PageMoveDirection::kScatter>;
  return device::Launch(kernel, grid, block, 0, stream, args);
}

}  // namespace pagetide::kernels
