#include "cli/demo/plant.h"

#include <filesystem>
#include <fstream>
#include <sstream>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/checksum.h"
#include "base/status_macros.h"
#include "pagetide/v1/page_store.grpc.pb.h"

namespace pagetide::demo {
namespace {

constexpr char kFlippedBit = 0x40;
constexpr size_t kPartBytes = size_t{1} << 20;

absl::StatusOr<std::pair<v1::PageHeader, std::string>> FetchPage(
    v1::PageStoreService::StubInterface* store, const std::string& page_key) {
  grpc::ClientContext context;
  SetDeadline(&context, absl::Seconds(10));
  v1::GetPagesRequest request;
  request.add_page_keys(page_key);
  const auto stream = store->GetPages(&context, request);
  v1::GetPagesResponse part;
  v1::PageHeader header;
  std::string body;
  bool hit = false;
  while (stream->Read(&part)) {
    if (part.has_header()) {
      header = part.header();
      hit = part.outcome() == v1::GetPagesResponse::OUTCOME_HIT;
    }
    body += part.body();
  }
  PT_RETURN_IF_ERROR(FromGrpcStatus(stream->Finish()));
  if (!hit || body.size() != header.body_bytes()) {
    return absl::NotFoundError("fetch page from the store: it is not there");
  }
  return std::make_pair(std::move(header), std::move(body));
}

}  // namespace

absl::StatusOr<std::string> PageKeyOf(const Sequence& sequence, size_t index) {
  v1::GetBlockTableRequest request;
  request.set_sequence_id(sequence.id());
  PT_ASSIGN_OR_RETURN(const v1::GetBlockTableResponse table,
                      CallUnary(sequence.worker().call_options(), sequence.worker().sequences(),
                                &v1::SequenceService::StubInterface::GetBlockTable, request));
  if (static_cast<int>(index) >= table.extents_size() ||
      table.extents(static_cast<int>(index)).page_key().size() != 32) {
    return absl::FailedPreconditionError(
        absl::StrCat("page ", index, " of ", sequence.id(), " has no key"));
  }
  return table.extents(static_cast<int>(index)).page_key();
}

absl::Status FlipOnDisk(const std::string& dir, absl::string_view needle) {
  int flipped = 0;
  std::error_code error;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(dir, error)) {
    if (!entry.is_regular_file()) continue;
    std::fstream file(entry.path(), std::ios::in | std::ios::out | std::ios::binary);
    std::stringstream bytes;
    bytes << file.rdbuf();
    const std::string text = std::move(bytes).str();
    for (size_t at = text.find(needle.data(), 0, needle.size()); at != std::string::npos;
         at = text.find(needle.data(), at + 1, needle.size())) {
      const size_t middle = at + needle.size() / 2;
      file.clear();
      file.seekp(static_cast<std::streamoff>(middle));
      file.put(static_cast<char>(text[middle] ^ kFlippedBit));
      ++flipped;
    }
  }
  if (error) return absl::InternalError(absl::StrCat("read folder ", dir, ": ", error.message()));
  if (flipped == 0) {
    return absl::NotFoundError(absl::StrCat("flip a byte under ", dir, ": the page is not there"));
  }
  return absl::OkStatus();
}

absl::Status ReplaceInStore(const std::string& store_address, const std::string& page_key,
                            const GroupGeometry& group, uint64_t offset) {
  const auto store = v1::PageStoreService::NewStub(MakeChannel(store_address));
  PT_ASSIGN_OR_RETURN(auto page, FetchPage(store.get(), page_key));
  auto& [header, body] = page;
  if (offset >= body.size()) {
    return absl::OutOfRangeError(
        absl::StrCat("flip byte ", offset, " of a page of ", body.size(), " bytes"));
  }
  body[offset] = static_cast<char>(body[offset] ^ kFlippedBit);
  const Checksum128 checksum = ChecksumOf(std::as_bytes(std::span(body)));
  // Whoever answers a fetch need not repeat what the caller knows; a put states all of it. Without
  // its prefix the record is a private page, which a restore by key finds just the same.
  header.set_page_key(page_key);
  header.set_fingerprint(group.fingerprint().ToBytes());
  header.mutable_checksum()->set_low(checksum.low);
  header.mutable_checksum()->set_high(checksum.high);

  v1::DeletePagesRequest drop;
  drop.add_page_keys(page_key);
  PT_ASSIGN_OR_RETURN(
      const v1::DeletePagesResponse dropped,
      CallUnary(CallOptions(), static_cast<v1::PageStoreService::StubInterface*>(store.get()),
                &v1::PageStoreService::StubInterface::DeletePages, drop));
  if (dropped.deleted() != 1) {
    return absl::FailedPreconditionError(absl::StrCat(
        "delete the page from the store: ", dropped.deleted(), " deleted, expected 1"));
  }
  grpc::ClientContext context;
  SetDeadline(&context, absl::Seconds(10));
  v1::PutPagesResponse response;
  const auto stream = store->PutPages(&context, &response);
  for (size_t at = 0; at < body.size(); at += kPartBytes) {
    v1::PutPagesRequest part;
    if (at == 0) {
      *part.mutable_header() = header;
      part.set_level(v1::DURABILITY_PROCESS);
    }
    part.set_body(body.substr(at, kPartBytes));
    if (!stream->Write(part)) break;  // Finish says why
  }
  stream->WritesDone();
  PT_RETURN_IF_ERROR(FromGrpcStatus(stream->Finish()));
  if (response.results_size() != 1 || response.results(0).code() != 0) {
    return absl::InternalError(
        absl::StrCat("put the flipped page: ",
                     response.results_size() == 1 ? response.results(0).message() : "no result"));
  }
  return absl::OkStatus();
}

}  // namespace pagetide::demo
