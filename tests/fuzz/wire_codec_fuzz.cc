// Messages of strangers into the domain: models, pages, manifests, residency and sequence reports.
// No message crashes a decoder, and what a codec accepts it encodes to something it accepts again.
// Input: one byte that chooses the message, then its protobuf bytes.
#include <string>
#include <vector>

#include "core/model.h"
#include "kvstore/page_store_codec.h"
#include "pagetide/v1/model.pb.h"
#include "pagetide/v1/page_store.pb.h"
#include "pagetide/v1/worker_registry.pb.h"
#include "rpc/model_codec.h"
#include "services/router_codec.h"
#include "tests/fuzz/fuzz_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pagetide;
  FuzzInput in(data, size);
  const uint8_t choice = in.Take<uint8_t>() % 6;
  const absl::string_view bytes = in.rest();
  const auto parse = [&](google::protobuf::MessageLite& message) {
    return message.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()));
  };
  if (choice == 0) {
    const auto model = ParseModelSpec(bytes);
    if (model.ok()) {
      const auto again = ParseModelSpec(SerializeModelSpec(model->spec()));
      FUZZ_CHECK(again.ok());
      FUZZ_CHECK(again->digest() == model->digest());
    }
  } else if (choice == 1) {
    v1::PageHeader proto;
    if (!parse(proto)) return 0;
    const auto meta = DecodePageHeader(proto);
    if (meta.ok()) {
      v1::PageHeader again;
      EncodePageHeader(*meta, &again);
      FUZZ_CHECK(DecodePageHeader(again).ok());
    }
  } else if (choice == 2) {
    v1::Manifest proto;
    if (!parse(proto)) return 0;
    const auto manifest = DecodeManifestMessage(proto);
    if (manifest.ok()) {
      v1::Manifest again;
      EncodeManifestMessage(*manifest, &again);
      FUZZ_CHECK(DecodeManifestMessage(again).ok());
    }
  } else if (choice == 3) {
    v1::ResidencyReport proto;
    if (!parse(proto)) return 0;
    std::vector<ResidencyDelta> changes;
    (void)ResidencyFromProto(proto, changes);
  } else if (choice == 4) {
    v1::SequenceReport proto;
    if (!parse(proto)) return 0;
    (void)SequencesFromProto(proto);
  } else {
    v1::AttachHello proto;
    if (!parse(proto)) return 0;
    (void)HelloFromProto(proto);
  }
  return 0;
}
