// EditedKvBackend: rows in plain arrays, K as it was written, turned by float64 when it is attended
// to. Nothing is paged, shared or deferred: what an edited sequence of a service is compared with.
// Not thread-safe.
#ifndef PAGETIDE_TESTS_CONFORMANCE_EDITED_KV_BACKEND_H_
#define PAGETIDE_TESTS_CONFORMANCE_EDITED_KV_BACKEND_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "decoder/decoder_config.h"
#include "decoder/kv_backend.h"
#include "kernels/convert.h"
#include "kernels/paged_attention.h"

namespace pagetide {

class EditedKvBackend final : public KvBackend {
 public:
  // What becomes of a turned row: encoded again, as a cache does it, or kept exact (f32).
  enum class Turned { kEncoded, kExact };
  explicit EditedKvBackend(const DecoderConfig& config, Turned turned = Turned::kEncoded)
      : config_(config),
        turned_(turned),
        shape_(AttentionShapeOf(config)),
        layers_(config.num_layers) {
    if (turned == Turned::kExact) {
      shape_.k_type = kernels::KvType::kF32;
      shape_.k_row_bytes = int64_t{4} * config.kv_width();
    }
  }

  int64_t length() const override { return static_cast<int64_t>(rows_.size()); }
  int64_t next_position() const override { return rows_.empty() ? 0 : rows_.back().position + 1; }

  absl::Status BeginAppend(std::span<const uint32_t> tokens) override {
    const int64_t first = next_position();
    committed_ = rows_.size();
    for (size_t i = 0; i < tokens.size(); ++i) {
      const int64_t at = first + static_cast<int64_t>(i);
      rows_.push_back({at, at});
    }
    return absl::OkStatus();
  }
  absl::Status AppendRows(int layer, std::span<const std::byte> k,
                          std::span<const std::byte> v) override {
    const size_t bytes = static_cast<size_t>(config_.row_bytes());
    for (size_t i = 0; i * bytes < k.size(); ++i) {
      layers_[layer].k.emplace_back(k.begin() + i * bytes, k.begin() + (i + 1) * bytes);
      layers_[layer].v.emplace_back(v.begin() + i * bytes, v.begin() + (i + 1) * bytes);
    }
    return absl::OkStatus();
  }
  absl::Status Attend(int layer, std::span<const float> queries, std::span<float> out) override {
    const size_t v_bytes = static_cast<size_t>(config_.row_bytes());
    const size_t k_bytes = turned_ == Turned::kExact ? 4 * config_.kv_width() : v_bytes;
    std::vector<std::byte> k, v;
    std::vector<kernels::KvRun> runs;
    for (size_t i = 0; i < rows_.size(); ++i) {
      const std::vector<std::byte> turned = Turn(layers_[layer].k[i], rows_[i]);
      k.insert(k.end(), turned.begin(), turned.end());
      v.insert(v.end(), layers_[layer].v[i].begin(), layers_[layer].v[i].end());
    }
    for (size_t i = 0; i < rows_.size(); ++i) {
      runs.push_back({k.data() + i * k_bytes, v.data() + i * v_bytes, rows_[i].position, 0, 1});
    }
    std::vector<int64_t> positions;
    for (size_t i = committed_; i < rows_.size(); ++i) positions.push_back(rows_[i].position);
    const kernels::AttentionArgs args{
        shape_,         runs.data(),      static_cast<int64_t>(runs.size()),
        queries.data(), positions.data(), static_cast<int64_t>(positions.size()),
        out.data(),     nullptr};
    if (const char* wrong = kernels::CheckAttentionArgs(args)) {
      return absl::InternalError(wrong);
    }
    kernels::AttendHost(args);
    return absl::OkStatus();
  }
  absl::Status Commit() override {
    committed_ = rows_.size();
    return absl::OkStatus();
  }
  void Abort() override { rows_.resize(committed_); }

  // Drops rows [begin, end).
  void Remove(size_t begin, size_t end) {
    rows_.erase(rows_.begin() + begin, rows_.begin() + end);
    for (Layer& layer : layers_) {
      layer.k.erase(layer.k.begin() + begin, layer.k.begin() + end);
      layer.v.erase(layer.v.begin() + begin, layer.v.begin() + end);
    }
    committed_ = rows_.size();
  }
  // Moves rows from `begin` on.
  void Shift(size_t begin, int64_t delta) {
    for (size_t i = begin; i < rows_.size(); ++i) rows_[i].position += delta;
  }

 private:
  struct Row {
    int64_t position;
    int64_t written_at;
  };
  struct Layer {
    std::vector<std::vector<std::byte>> k, v;  // [row]
  };

  std::vector<std::byte> Turn(const std::vector<std::byte>& k, const Row& row) const {
    if (row.position == row.written_at && turned_ == Turned::kEncoded) return k;
    std::vector<float> x(config_.kv_width());
    kernels::WidenToF32(config_.kv_type, k.data(), config_.kv_width(), x.data());
    const double delta = static_cast<double>(row.position - row.written_at);
    for (int head = 0; head < config_.num_kv_heads; ++head) {
      float* const h = x.data() + head * config_.head_dim;
      for (int i = 0; i < config_.head_dim; i += 2) {
        const double angle =
            delta * std::pow(static_cast<double>(config_.rope_base), -1.0 * i / config_.head_dim);
        const double a = h[i], b = h[i + 1];
        h[i] = static_cast<float>(a * std::cos(angle) - b * std::sin(angle));
        h[i + 1] = static_cast<float>(a * std::sin(angle) + b * std::cos(angle));
      }
    }
    if (turned_ == Turned::kExact) {
      std::vector<std::byte> out(x.size() * sizeof(float));
      std::memcpy(out.data(), x.data(), out.size());
      return out;
    }
    std::vector<std::byte> out(k.size());
    kernels::NarrowFromF32(config_.kv_type, x.data(), config_.kv_width(), out.data());
    return out;
  }

  const DecoderConfig config_;
  const Turned turned_;
  kernels::AttentionShape shape_;  // const after construction
  std::vector<Row> rows_;
  std::vector<Layer> layers_;
  size_t committed_ = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_CONFORMANCE_EDITED_KV_BACKEND_H_
