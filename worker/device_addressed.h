// DeviceAddressed: of a DevicePool whose memory a GPU addresses, where it begins there. For
// libraries that move bytes between GPUs by themselves.
#ifndef PAGETIDE_WORKER_DEVICE_ADDRESSED_H_
#define PAGETIDE_WORKER_DEVICE_ADDRESSED_H_

namespace pagetide {

class DeviceAddressed {
 public:
  virtual ~DeviceAddressed() = default;
  virtual void* device_address() = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_DEVICE_ADDRESSED_H_
