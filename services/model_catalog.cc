#include "services/model_catalog.h"

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "rpc/model_codec.h"

namespace pagetide {
namespace {

constexpr absl::string_view kModelKind = "model";
constexpr absl::string_view kNameKind = "model_name";
constexpr size_t kListPage = 500;

bool IsDigestHex(absl::string_view text) {
  return text.size() == 64 && std::all_of(text.begin(), text.end(), [](char c) {
           return absl::ascii_isdigit(c) || (c >= 'a' && c <= 'f');
         });
}

absl::Status ModelNotFound(absl::string_view digest_or_name) {
  return WithReason(absl::NotFoundError(absl::StrCat("model ", digest_or_name.substr(0, 128),
                                                     " is not registered")),
                    error_reason::kModelNotFound);
}

absl::Status NameTaken(absl::string_view name, absl::string_view owner, absl::string_view digest) {
  return absl::AlreadyExistsError(absl::StrCat("register model ", name, ": the name belongs to ",
                                               owner.substr(0, 12), "…, this one is ",
                                               digest.substr(0, 12), "…"));
}

}  // namespace

ModelCatalog::ModelCatalog(Options options, PageStore* store, const Clock* clock)
    : options_(options), store_(store), clock_(clock) {}

absl::Status ModelCatalog::CheckRoom(absl::string_view digest) const {
  MutexLock lock(&mu_);
  return CheckRoomLocked(digest);
}

absl::Status ModelCatalog::CheckRoomLocked(absl::string_view digest) const {
  if (by_digest_.contains(digest) || by_digest_.size() < options_.max_models) {
    return absl::OkStatus();
  }
  return absl::ResourceExhaustedError(absl::StrCat("register model: ", by_digest_.size(),
                                                   " models, at most ", options_.max_models));
}

absl::Status ModelCatalog::Insert(std::shared_ptr<const Model> model, absl::string_view name) {
  const std::string digest = model->digest().ToHex();
  MutexLock lock(&mu_);
  unknown_until_.erase(digest);
  PT_RETURN_IF_ERROR(CheckRoomLocked(digest));
  by_digest_.try_emplace(digest, std::move(model));
  if (!name.empty()) {
    unknown_until_.erase(name);
    if (digest_of_name_.size() < 4 * options_.max_models || digest_of_name_.contains(name)) {
      digest_of_name_[name] = digest;
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<ModelCatalog::Registered> ModelCatalog::Register(const Model& model,
                                                                MonotonicTime deadline) {
  const std::string digest = model.digest().ToHex();
  const std::string& name = model.spec().name;
  // What the name stands for after this call, ours or another.
  std::string owner = digest;
  bool was_registered = false;
  if (store_ == nullptr) {
    MutexLock lock(&mu_);
    const auto it = digest_of_name_.find(name);
    was_registered = it != digest_of_name_.end();
    if (was_registered) owner = it->second;
  } else {
    // A name that is taken is refused before anything is written.
    const auto taken = store_->GetRecord(kNameKind, name, deadline);
    if (taken.ok() && taken->value != digest) {
      return NameTaken(name, taken->value, digest);
    }
    PT_RETURN_IF_ERROR(CheckRoom(digest));
    // The spec first, so that a name never points to nothing. Both writes create or find what is
    // there; a crash between them leaves a model without a name, which the retry completes.
    const auto put_model = store_->CompareAndSetRecord(kModelKind, digest, /*expected_version=*/0,
                                                       SerializeModelSpec(model.spec()), deadline);
    if (!put_model.ok() && put_model.status().code() != absl::StatusCode::kFailedPrecondition) {
      return put_model.status();
    }
    const auto put_name =
        store_->CompareAndSetRecord(kNameKind, name, /*expected_version=*/0, digest, deadline);
    if (!put_name.ok()) {
      if (put_name.status().code() != absl::StatusCode::kFailedPrecondition) {
        return put_name.status();
      }
      PT_ASSIGN_OR_RETURN(StoreRecord record, store_->GetRecord(kNameKind, name, deadline));
      owner = std::move(record.value);
      was_registered = true;
    }
  }
  if (owner != digest) {
    return NameTaken(name, owner, digest);
  }
  PT_RETURN_IF_ERROR(Insert(std::make_shared<const Model>(model), name));
  return Registered{FindCached(digest), was_registered};
}

std::shared_ptr<const Model> ModelCatalog::FindCached(absl::string_view digest_or_name) const {
  MutexLock lock(&mu_);
  auto it = by_digest_.find(digest_or_name);
  if (it == by_digest_.end()) {
    const auto name = digest_of_name_.find(digest_or_name);
    if (name == digest_of_name_.end()) return nullptr;
    it = by_digest_.find(name->second);
  }
  return it == by_digest_.end() ? nullptr : it->second;
}

absl::StatusOr<std::shared_ptr<const Model>> ModelCatalog::Find(absl::string_view digest_or_name,
                                                                MonotonicTime deadline) {
  if (auto model = FindCached(digest_or_name)) return model;
  const bool is_digest = IsDigestHex(digest_or_name);
  if (store_ == nullptr || (!is_digest && !ValidateName("model", digest_or_name).ok())) {
    return ModelNotFound(digest_or_name);
  }
  {
    MutexLock lock(&mu_);
    const auto it = unknown_until_.find(digest_or_name);
    if (it != unknown_until_.end() && clock_->MonotonicNow() < it->second) {
      return ModelNotFound(digest_or_name);
    }
  }
  std::string digest(digest_or_name);
  absl::StatusOr<StoreRecord> record;
  if (!is_digest) {
    record = store_->GetRecord(kNameKind, digest_or_name, deadline);
    if (record.ok()) digest = record->value;
  }
  if (is_digest || record.ok()) record = store_->GetRecord(kModelKind, digest, deadline);
  if (record.status().code() == absl::StatusCode::kNotFound) {
    MutexLock lock(&mu_);
    if (unknown_until_.size() >= options_.max_unknown) unknown_until_.clear();
    unknown_until_[digest_or_name] = clock_->MonotonicNow() + options_.unknown_retention;
    return ModelNotFound(digest_or_name);
  }
  PT_RETURN_IF_ERROR(record.status());
  PT_ASSIGN_OR_RETURN(Model model, ParseModelSpec(record->value));
  if (model.digest().ToHex() != digest) {
    return absl::DataLossError(absl::StrCat("model record ", digest.substr(0, 12),
                                            "… holds the model ", model.digest().ToShortHex(),
                                            "…"));
  }
  auto shared = std::make_shared<const Model>(std::move(model));
  // Known here from now on, unless there are too many: then the store is asked each time.
  Insert(shared, is_digest ? absl::string_view() : digest_or_name).IgnoreError();
  return shared;
}

absl::StatusOr<std::vector<std::shared_ptr<const Model>>> ModelCatalog::List(
    MonotonicTime deadline) {
  std::vector<std::shared_ptr<const Model>> models;
  if (store_ == nullptr) {
    MutexLock lock(&mu_);
    for (const auto& [digest, model] : by_digest_) models.push_back(model);
  } else {
    std::string after;
    for (;;) {
      PT_ASSIGN_OR_RETURN(std::vector<StoreRecord> records,
                          store_->ListRecords(kModelKind, "", after, kListPage, deadline));
      for (const StoreRecord& record : records) {
        PT_ASSIGN_OR_RETURN(Model model, ParseModelSpec(record.value));
        models.push_back(std::make_shared<const Model>(std::move(model)));
      }
      if (records.size() < kListPage || models.size() >= options_.max_models) break;
      after = records.back().key;
    }
  }
  std::sort(models.begin(), models.end(),
            [](const auto& a, const auto& b) { return a->digest() < b->digest(); });
  return models;
}

}  // namespace pagetide
