// From bit-planes, most significant first, to whole pixels of WIDTH channels with BITS bits each.
module words #(
  parameter WIDTH = 1,
  parameter BITS = 4
) (
  input wire clk,
  input wire rst,
  input wire [WIDTH-1:0] in_data,
  input wire in_valid,
  output wire in_ready,
  output wire [WIDTH*BITS-1:0] out_data,
  output reg out_valid,
  input wire out_ready
);
  localparam BB = BITS > 1 ? $clog2(BITS) : 1;
  localparam [BB-1:0] LAST = BITS[BB-1:0] - 1'b1;
  reg [BB-1:0] beat;
  assign in_ready = ~out_valid | out_ready;
  genvar i;
  generate
    for (i = 0; i < WIDTH; i = i + 1) begin : channel
      reg [BITS-1:0] word;
      wire unused_top;
      wire [BITS-1:0] next;
      assign {unused_top, next} = {word, in_data[i]};
      always @(posedge clk) if (in_valid & in_ready) word <= next;
      assign out_data[BITS*i +: BITS] = word;
    end
  endgenerate
  always @(posedge clk)
    if (rst) begin
      beat <= 0;
      out_valid <= 1'b0;
    end else if (in_valid & in_ready) begin
      beat <= beat == LAST ? 0 : beat + 1'b1;
      out_valid <= beat == LAST;
    end else if (out_ready) out_valid <= 1'b0;
endmodule
