// Runs the CUDA launchers on the CPU: reads one case from standard input (a line of numbers, then
// the arrays), writes the results to standard output. tests/test_simt.py speaks to it.
//
// Every array lies in an allocation of exactly its size, shifted by `shift` elements, so that the
// address sanitizer sees each read and write outside it, and the alignment sanitizer each vector
// access that the launcher should not have chosen.
#define DNKD_WITH_CUDA
#include <iostream>
#include <map>
#include <string>

#include "common/scale.cu"
#include "ops/cuda/nd_loss.cu"

namespace {

using namespace dnkd;

std::map<std::string, double> numbers;

double number(const char* name) {
  const auto found = numbers.find(name);
  if (found == numbers.end()) {
    std::fprintf(stderr, "harness: no number %s\n", name);
    std::exit(2);
  }
  return found->second;
}

int64_t integer(const char* name) { return static_cast<int64_t>(number(name)); }

class Array {
 public:
  Array(int64_t count, int64_t element, int64_t shift) : bytes_(count * element) {
    memory_ = static_cast<char*>(std::malloc(bytes_ + shift * element));
    data_ = memory_ + shift * element;
    std::memset(memory_, 0xff, bytes_ + shift * element);  // NaN where nothing is written
  }
  ~Array() { std::free(memory_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  void* read() {
    if (std::fread(data_, 1, bytes_, stdin) != static_cast<size_t>(bytes_)) {
      std::fprintf(stderr, "harness: input ended early\n");
      std::exit(2);
    }
    return data_;
  }
  void write() const { std::fwrite(data_, 1, bytes_, stdout); }
  void* data() { return data_; }

 private:
  int64_t bytes_;
  char* memory_;
  char* data_;
};

int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// Rows `stride` elements apart need no memory behind the last one.
int64_t span(int64_t rows, int64_t columns, int64_t stride) {
  return rows == 0 ? 0 : (rows - 1) * stride + columns;
}

void check(int error) {
  if (error != 0) {
    std::fprintf(stderr, "harness: launcher returned %d\n", error);
    std::exit(2);
  }
}

void nd_loss() {
  NdLossParams p{};
  p.dtype = static_cast<Dtype>(integer("dtype"));
  p.directions_are_float = integer("directions_are_float") != 0;
  p.target_is_int32 = integer("target") == 32;
  p.rows = integer("rows");
  p.columns = integer("columns");
  p.classes = integer("classes");
  p.ignore_index = integer("ignore_index");
  p.reduction = static_cast<Reduction>(integer("reduction"));
  p.eps = number("eps");
  p.loss_weight = number("loss_weight");
  p.student_stride = p.teacher_stride = integer("stride");
  p.directions_stride = integer("directions_stride");
  const int64_t size = size_of(p.dtype);
  const int64_t scalar = p.dtype == Dtype::kFloat64 ? 8 : 4;
  const int64_t shift = integer("shift");
  const bool is_none = p.reduction == Reduction::kNone;
  const int64_t features = span(p.rows, p.columns, p.student_stride);

  Array student(features, size, shift), teacher(features, size, shift), norms(p.rows, scalar, 0);
  Array directions(span(p.classes, p.columns, p.directions_stride),
                   p.directions_are_float ? 4 : size, shift);
  Array target(p.rows, p.target_is_int32 ? 4 : 8, 0), weight(1, scalar, 0),
      upstream(p.rows, scalar, 0);
  Array loss(is_none ? p.rows : 1, scalar, 0), gradient(p.rows * p.columns, size, 0),
      coefficients(2 * p.rows, scalar, 0);

  p.student = student.read();
  if (integer("teacher") == 1) {
    p.teacher = teacher.read();
  } else if (integer("teacher") == 2) {
    p.teacher_norms = norms.read();
  }
  p.directions = directions.read();
  if (integer("target") != 0) {
    p.target = target.read();
  }
  if (integer("weight_tensor") != 0) {
    p.weight = weight.read();
  }
  p.classes += integer("phantom_classes");  // to see that reading behind the table is caught
  p.loss = loss.data();
  const bool keeps_coefficients = integer("saves") == 2;
  if (integer("saves") == 1) {
    p.gradient = gradient.data();
  } else if (keeps_coefficients) {
    p.coefficients = coefficients.data();
  }
  Array scratch(nd_loss_scratch_bytes_cuda(p), 1, 0);
  check(nd_loss_forward_cuda(p, scratch.data(), nullptr));
  loss.write();
  if (keeps_coefficients) {
    NdLossBackwardParams b{};
    b.dtype = p.dtype;
    b.directions_are_float = p.directions_are_float;
    b.target_is_int32 = p.target_is_int32;
    b.rows = p.rows;
    b.columns = p.columns;
    b.classes = p.classes;
    b.upstream = upstream.read();
    b.upstream_stride = is_none ? 1 : 0;
    b.student = p.student;
    b.directions = p.directions;
    b.target = p.target;
    b.coefficients = p.coefficients;
    b.student_stride = p.student_stride;
    b.directions_stride = p.directions_stride;
    b.gradient = gradient.data();
    check(nd_loss_backward_cuda(b, nullptr));
  }
  if (integer("saves") != 0) {
    gradient.write();
  }
}

void scale() {
  const auto dtype = static_cast<Dtype>(integer("dtype"));
  const int64_t count = integer("count");
  Array gradient(count, size_of(dtype), 0), upstream(1, dtype == Dtype::kFloat64 ? 8 : 4, 0);
  gradient.read();
  upstream.read();
  check(scale_cuda(dtype, count, gradient.data(), upstream.data(), nullptr));
  gradient.write();
}

}  // namespace

int main() {
  std::string line, name;
  int c;
  while ((c = std::getchar()) != '\n' && c != EOF) {
    line += static_cast<char>(c);
  }
  size_t at = 0;
  while (at < line.size()) {  // NAME=NUMBER separated by blanks; the first word names the launcher
    size_t end = line.find(' ', at);
    end = end == std::string::npos ? line.size() : end;
    const std::string word = line.substr(at, end - at);
    const size_t equals = word.find('=');
    if (equals == std::string::npos) {
      name = word;
    } else {
      numbers[word.substr(0, equals)] = std::strtod(word.c_str() + equals + 1, nullptr);
    }
    at = end + 1;
  }
  simt::multiprocessors = static_cast<int>(integer("multiprocessors"));
  simt::reverse_blocks = integer("reverse_blocks") != 0;
  name == "scale" ? scale() : nd_loss();
  return 0;
}
