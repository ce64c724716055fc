#include "clients/cpp/attention_merge.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

constexpr double kNoRows = -std::numeric_limits<double>::infinity();

absl::Status Check(std::span<const AttentionPart> parts, std::span<const float> outputs,
                   std::span<const float> log_sum_exp) {
  if (parts.empty()) return absl::InvalidArgumentError("merge attention: no parts");
  const size_t rows = parts[0].log_sum_exp.size();
  for (size_t i = 0; i < parts.size(); ++i) {
    const AttentionPart& part = parts[i];
    if (part.log_sum_exp.size() != rows || part.outputs.size() != outputs.size() ||
        (rows == 0 ? !outputs.empty() : outputs.size() % rows != 0)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "merge attention: part ", i, " has ", part.outputs.size(), " outputs and ",
          part.log_sum_exp.size(), " log_sum_exp, the result ", outputs.size(), " and ", rows));
    }
    for (const float lse : part.log_sum_exp) {
      if (std::isnan(lse) || lse == std::numeric_limits<float>::infinity()) {
        return absl::InvalidArgumentError(
            absl::StrCat("merge attention: part ", i, " has a log_sum_exp of ", lse));
      }
    }
  }
  if (!log_sum_exp.empty() && log_sum_exp.size() != rows) {
    return absl::InvalidArgumentError(absl::StrCat("merge attention: room for ", log_sum_exp.size(),
                                                   " log_sum_exp, the parts have ", rows));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status MergeAttention(std::span<const AttentionPart> parts, std::span<float> outputs,
                            std::span<float> log_sum_exp) {
  PT_RETURN_IF_ERROR(Check(parts, outputs, log_sum_exp));
  const size_t rows = parts[0].log_sum_exp.size();
  const size_t dim = rows == 0 ? 0 : outputs.size() / rows;
  for (size_t row = 0; row < rows; ++row) {
    double highest = kNoRows;
    for (const AttentionPart& part : parts) {
      highest = std::max(highest, double{part.log_sum_exp[row]});
    }
    double sum = 0;
    for (const AttentionPart& part : parts) {
      if (highest != kNoRows) sum += std::exp(part.log_sum_exp[row] - highest);
    }
    const double total = highest == kNoRows ? kNoRows : highest + std::log(sum);
    for (size_t d = 0; d < dim; ++d) {
      double value = 0;
      for (const AttentionPart& part : parts) {
        if (part.log_sum_exp[row] == -std::numeric_limits<float>::infinity()) continue;
        value += std::exp(part.log_sum_exp[row] - total) * part.outputs[row * dim + d];
      }
      outputs[row * dim + d] = static_cast<float>(value);
    }
    if (!log_sum_exp.empty()) log_sum_exp[row] = static_cast<float>(total);
  }
  return absl::OkStatus();
}

}  // namespace pagetide
