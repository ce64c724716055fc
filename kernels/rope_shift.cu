#include <algorithm>

#include "kernels/device_codec.cuh"
#include "kernels/device_launch.cuh"
#include "kernels/rope_shift.h"

namespace pagetide::kernels {
namespace {

constexpr int kMaxWarps = 8;
constexpr int64_t kSharedBytes = 48 * 1024;

// Elements [first, first + count) of a head that are decoded and encoded again.
struct Span {
  int32_t first;
  int32_t count;
};

// Element `at` of the span after the turn; `head` holds the span as it was, the rotation beginning
// at element rope_at. The expressions are the host's, operation for operation.
__device__ inline float Turned(const RopeParams& params, int32_t rope_at, const float* cos_sin,
                               const float* head, int32_t at) {
  const float x = head[at];
  const int32_t e = at - rope_at;  // index in the rotation
  if (e < 0 || e >= params.n_rot) return x;
  const int32_t half = params.n_rot / 2;
  const bool neox = params.style == RopeStyle::kNeox;
  const bool is_first = neox ? e < half : (e & 1) == 0;
  const int32_t pair = neox ? (is_first ? e : e - half) : e / 2;
  const float y = head[rope_at + (neox ? (is_first ? e + half : e - half) : e ^ 1)];
  const float c = cos_sin[2 * pair];
  const float s = cos_sin[2 * pair + 1];
  return is_first ? x * c - y * s : y * s + x * c;
}

// A warp turns one head of one row: decodes the span to shared memory, turns and encodes it from
// there. Grid: x row and head (strided), y runs (strided), z layers (strided).
template <KvType kType>
__global__ void __launch_bounds__(32 * kMaxWarps, 2)
    RopeShiftKernel(RopeShiftArgs args, Span span) {
  PAGETIDE_DYNAMIC_SHARED(float4, shared);
  float* head = reinterpret_cast<float*>(shared) + threadIdx.y * ((span.count + 3) & ~3);
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t head_bytes = EncodedBytes(kType, args.head_dim);
  const int64_t span_at = EncodedBytes(kType, span.first);
  const int64_t span_bytes = EncodedBytes(kType, span.count);
  const int32_t chunks = span.count / device::kLaneElements;
  const int32_t rope_at = args.rope_offset - span.first;
  for (int64_t r = blockIdx.y; r < args.num_runs; r += gridDim.y) {
    const RopeShiftRun run = args.runs[r];
    const float* cos_sin = args.cos_sin + r * args.params.n_rot;
    const int64_t units = run.num_rows * args.num_heads;
    for (int64_t layer = blockIdx.z; layer < args.num_layers; layer += gridDim.z) {
      for (int64_t unit = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; unit < units;
           unit += static_cast<int64_t>(gridDim.x) * blockDim.y) {
        const int64_t row = unit / args.num_heads;
        const int64_t of_head = unit % args.num_heads * head_bytes;
        const char* in = device::Global(static_cast<const char*>(run.in)) +
                         layer * args.in_layer_bytes + row * args.in_row_bytes + of_head;
        char* out = device::Global(static_cast<char*>(run.out)) + layer * args.out_layer_bytes +
                    row * args.out_row_bytes + of_head;
        if (run.delta == 0) {
          if (in != out) device::CopyBytes(in, out, head_bytes, lane, 32);
          continue;
        }
        if (in != out) {
          device::CopyBytes(in, out, span_at, lane, 32);
          const int64_t end = span_at + span_bytes;
          device::CopyBytes(in + end, out + end, head_bytes - end, lane, 32);
        }
        in += span_at;
        out += span_at;
        const bool wide =
            IsBlockType(kType) || (device::IsAligned(in, 16) && device::IsAligned(out, 16));
        __syncwarp();
        for (int32_t chunk = lane; chunk < chunks; chunk += 32) {
          float x[device::kLaneElements];
          if (wide) {
            device::LoadEight<kType, true>(in, chunk, x);
          } else {
            device::LoadEight<kType, false>(in, chunk, x);
          }
          float4* to = reinterpret_cast<float4*>(head + chunk * device::kLaneElements);
          to[0] = make_float4(x[0], x[1], x[2], x[3]);
          to[1] = make_float4(x[4], x[5], x[6], x[7]);
        }
        const int32_t rest = chunks * device::kLaneElements + lane;  // plain types only
        if constexpr (!IsBlockType(kType)) {
          if (rest < span.count) head[rest] = device::LoadPlain<kType>(in, rest);
        }
        __syncwarp();
        for (int32_t chunk = lane; chunk < chunks; chunk += 32) {
          float x[device::kLaneElements];
#pragma unroll
          for (int i = 0; i < device::kLaneElements; ++i) {
            x[i] = Turned(args.params, rope_at, cos_sin, head, chunk * device::kLaneElements + i);
          }
          if (wide) {
            device::StoreEight<kType, true>(x, out, chunk);
          } else {
            device::StoreEight<kType, false>(x, out, chunk);
          }
        }
        if constexpr (!IsBlockType(kType)) {
          if (rest < span.count) {
            device::StorePlain<kType>(Turned(args.params, rope_at, cos_sin, head, rest), out, rest);
          }
        }
      }
    }
  }
}

using Kernel = void (*)(RopeShiftArgs, Span);
constexpr Kernel kKernels[kNumKvTypes] = {
    RopeShiftKernel<KvType::kF32>,    RopeShiftKernel<KvType::kF16>,
    RopeShiftKernel<KvType::kBF16>,   RopeShiftKernel<KvType::kF8E4M3>,
    RopeShiftKernel<KvType::kF8E5M2>, RopeShiftKernel<KvType::kQ8_0>,
    RopeShiftKernel<KvType::kQ5_0>,   RopeShiftKernel<KvType::kQ5_1>,
    RopeShiftKernel<KvType::kQ4_0>,   RopeShiftKernel<KvType::kQ4_1>,
    RopeShiftKernel<KvType::kIQ4NL>};

}  // namespace

int RopeShiftCuda(const RopeShiftArgs& args, CudaStream stream) {
  if (args.num_runs == 0 || args.max_rows == 0) return cudaSuccess;
  const int32_t group = GroupElements(args.type);
  Span span;
  span.first = args.rope_offset / group * group;
  span.count = (args.rope_offset + args.params.n_rot + group - 1) / group * group - span.first;
  const int64_t head_shared = (span.count + 3) / 4 * static_cast<int64_t>(sizeof(float4));
  const int64_t warps = std::min<int64_t>(kMaxWarps, kSharedBytes / head_shared);
  if (warps == 0) return cudaErrorInvalidValue;
  const int64_t units = args.max_rows * args.num_heads;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>((units + warps - 1) / warps, 1 << 20)),
                  static_cast<unsigned>(std::min<int64_t>(args.num_runs, 65535)),
                  static_cast<unsigned>(std::min(args.num_layers, 65535)));
  const dim3 block(32, static_cast<unsigned>(warps));
  return device::Launch(kKernels[static_cast<int>(args.type)], grid, block,
                        static_cast<size_t>(warps * head_shared), stream, args, span);
}

}  // namespace pagetide::kernels
